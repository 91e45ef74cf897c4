"""The sizes of a model that rotations and the KV cache depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["ModelSizes"]


@dataclass(frozen=True)
class ModelSizes:
    """Sizes in channels or heads; ``layers`` is a count.

    ``more_intermediate`` are sizes of MLPs beside ``intermediate``: where that is an expert's, those of a
    shared expert and of layers without experts.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    more_intermediate: tuple[int, ...] = ()

    @classmethod
    def from_config(
        cls,
        config: Any,
        intermediate_size: str = "intermediate_size",
        more_intermediate: tuple[int, ...] = (),
    ) -> ModelSizes:
        """Read the sizes off a transformers configuration; ``head_dim`` need not be ``hidden / heads``."""
        heads = config.num_attention_heads
        return cls(
            hidden=config.hidden_size,
            intermediate=getattr(config, intermediate_size),
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            layers=config.num_hidden_layers,
            more_intermediate=more_intermediate,
        )
