"""Granite 3, dense: Llama with multipliers of its own for embedding, attention, residual and logits."""

from __future__ import annotations

from .family import ModelFamily
from .llama import LLAMA_INPUTS
from .sizes import ModelSizes

__all__ = ["GRANITE"]

GRANITE = ModelFamily(
    "granite",
    "GraniteForCausalLM",
    LLAMA_INPUTS,
    public={
        "Granite-3.3-2B": ModelSizes(2048, 8192, 32, 8, 64, 40),
        "Granite-3.3-8B": ModelSizes(4096, 12800, 32, 8, 128, 40),
    },
)
