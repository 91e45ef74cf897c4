"""Qwen3: Llama with norms on each head's query and key, and heads that need not fill the hidden size."""

from __future__ import annotations

from .family import ModelFamily
from .llama import LLAMA_INPUTS
from .sizes import ModelSizes

__all__ = ["QWEN3"]

QWEN3 = ModelFamily(
    "qwen3",
    "Qwen3ForCausalLM",
    LLAMA_INPUTS,
    public={
        "Qwen3-0.6B": ModelSizes(1024, 3072, 16, 8, 128, 28),
        "Qwen3-1.7B": ModelSizes(2048, 6144, 16, 8, 128, 28),
        "Qwen3-4B": ModelSizes(2560, 9728, 32, 8, 128, 36),
        "Qwen3-8B": ModelSizes(4096, 12288, 32, 8, 128, 36),
        "Qwen3-14B": ModelSizes(5120, 17408, 40, 8, 128, 40),
        "Qwen3-32B": ModelSizes(5120, 25600, 64, 8, 128, 64),
    },
)
