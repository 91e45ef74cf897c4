"""SmolLM3: Llama, with layers that do without RoPE."""

from __future__ import annotations

from .family import ModelFamily
from .llama import LLAMA_INPUTS
from .sizes import ModelSizes

__all__ = ["SMOLLM3"]

SMOLLM3 = ModelFamily(
    "smollm3",
    "SmolLM3ForCausalLM",
    LLAMA_INPUTS,
    rotates_keys=lambda config, index: bool(config.no_rope_layers[index]),
    public={
        "SmolLM3-3B": ModelSizes(2048, 11008, 16, 4, 128, 36),
    },
)
