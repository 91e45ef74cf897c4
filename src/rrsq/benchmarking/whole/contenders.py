"""What runs beside a checkpoint: what each engine offers by itself for a model of the same shape.

To add one, give it a line in :data:`CONTENDERS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["BASE", "CONTENDERS", "DEFAULTS", "OURS", "Contender"]

OURS = "rrsq"
BASE = "bf16"
"""What ratios are taken to."""


@dataclass(frozen=True)
class Contender:
    """A way to run a model.

    Attributes:
        describes: in words.
        section: ``quantization_config`` of the model's ``config.json``, or None.
        options: of vLLM's ``LLM``, or of ``generate()`` of transformers.
    """

    describes: str
    section: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


_COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"]}
_INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
_FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}


def _compressed(activations: Mapping[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": _INT4, "input_activations": activations}
    return {**_COMPRESSED, "config_groups": {"group_0": group}}


CONTENDERS: Mapping[str, Mapping[str, Contender]] = {
    "vllm": {
        "bf16": Contender("16 bits"),
        "fp8": Contender("weights and activations in FP8, quantized by vLLM", None, {"quantization": "fp8"}),
        "w4a16": Contender("4-bit weights in groups of 128 (Marlin)", _compressed(None)),
        "w4afp8": Contender("4-bit weights in groups of 128, FP8 activations (CUTLASS)", _compressed(_FP8)),
    },
    "transformers": {
        "bf16": Contender("16 bits, plain generate()"),
        "bf16-static": Contender(
            "16 bits, static cache, compiled by transformers (on a GPU)",
            None,
            {"cache_implementation": "static"},
        ),
    },
}
"""By engine and name. Their weights are random."""

DEFAULTS: Mapping[str, str] = {"vllm": "bf16,fp8,w4a16", "transformers": "bf16,bf16-static"}
