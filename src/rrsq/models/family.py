"""What rrsq must know of a model family, as data.

A family names the modules of its decoder layer by what reads and writes what; everything else (sizes, biases,
grouped-query attention, tied embeddings) is read off the model itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["LinearInput", "ModelFamily", "ModelSizes"]


@dataclass(frozen=True)
class LinearInput:
    """One tensor that linears of a decoder layer read, with the linears that read it.

    Linears of one input share its quantization (serving engines fuse them) and its GPTQ Hessian.

    Attributes:
        name: ``qkv``, ``o``, ``gate_up`` or ``down``; recipes refer to it.
        parent: module path of the linears' parent, from the decoder layer.
        linears: attribute names of the linears in ``parent``.
        norm: module path (from the decoder layer) of the RMSNorm that produces the input, or None.
        writes_residual: the linears' outputs are added to the residual stream.
    """

    name: Literal["qkv", "o", "gate_up", "down"]
    parent: str
    linears: tuple[str, ...]
    norm: str | None = None
    writes_residual: bool = False

    @property
    def quantizer_name(self) -> str:
        """Attribute of ``parent`` under which a quantized model keeps the input's quantizer."""
        return f"{self.name}_input"


@dataclass(frozen=True)
class ModelFamily:
    """A family of decoder-only models.

    Attributes:
        model_type: ``config.model_type`` of transformers.
        architecture: class name of the causal language model.
        inputs: the inputs of quantized linears of one decoder layer, in the order the layer runs them.
        embedding, layers, final_norm, head, rotary: module paths from the model's root.
        attention: module path of the attention from the decoder layer.
        value, key: names of the projections in the attention.
        tested_on: public checkpoints or packages the family was run on.
    """

    model_type: str
    architecture: str
    inputs: tuple[LinearInput, ...]
    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    rotary: str = "model.rotary_emb"
    attention: str = "self_attn"
    value: str = "v_proj"
    key: str = "k_proj"
    tested_on: tuple[str, ...] = ()

    def input(self, name: str) -> LinearInput:
        """The :class:`LinearInput` called ``name``."""
        return next(entry for entry in self.inputs if entry.name == name)


@dataclass(frozen=True)
class ModelSizes:
    """The sizes that rotations depend on, in channels or heads."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int

    @classmethod
    def from_config(cls, config: Any) -> ModelSizes:
        """Read the sizes off a transformers configuration; ``head_dim`` need not be ``hidden / heads``."""
        heads = config.num_attention_heads
        return cls(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            layers=config.num_hidden_layers,
        )

    def channels(self, input_name: str) -> int:
        """Channels of a linear input."""
        return {"o": self.heads * self.head_dim, "down": self.intermediate}.get(input_name, self.hidden)
