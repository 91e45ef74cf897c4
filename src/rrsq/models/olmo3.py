"""OLMo-3: OLMo-2 with sliding windows in most layers, and RoPE that differs by type of layer."""

from __future__ import annotations

from .family import ModelFamily
from .olmo2 import OLMO2
from .sizes import ModelSizes

__all__ = ["OLMO3"]

OLMO3 = ModelFamily(
    "olmo3",
    "Olmo3ForCausalLM",
    OLMO2.inputs,
    rotary_by_layer_type=True,
    public={
        "OLMo-3-7B": ModelSizes(4096, 11008, 32, 32, 128, 32),
        "OLMo-3-32B": ModelSizes(5120, 27648, 40, 8, 128, 64),
    },
)
