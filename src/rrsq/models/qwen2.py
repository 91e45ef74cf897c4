"""Qwen1.5, Qwen2 and Qwen2.5: Llama with biases on q, k and v."""

from __future__ import annotations

from .family import ModelFamily
from .llama import LLAMA_INPUTS
from .sizes import ModelSizes

__all__ = ["QWEN2"]

QWEN2 = ModelFamily(
    "qwen2",
    "Qwen2ForCausalLM",
    LLAMA_INPUTS,
    public={
        "Qwen2.5-0.5B": ModelSizes(896, 4864, 14, 2, 64, 24),
        "Qwen2.5-1.5B": ModelSizes(1536, 8960, 12, 2, 128, 28),
        "Qwen2.5-3B": ModelSizes(2048, 11008, 16, 2, 128, 36),
        "Qwen2.5-7B": ModelSizes(3584, 18944, 28, 4, 128, 28),
        "Qwen2.5-14B": ModelSizes(5120, 13824, 40, 8, 128, 48),
        "Qwen2.5-32B": ModelSizes(5120, 27648, 40, 8, 128, 64),
        "Qwen2.5-72B": ModelSizes(8192, 29568, 64, 8, 128, 80),
    },
    tested_on=("Qwen2.5-Coder-0.5B",),
)
