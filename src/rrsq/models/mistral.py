"""Mistral: Llama with sliding-window attention in all layers, or none."""

from __future__ import annotations

from .family import ModelFamily
from .llama import LLAMA_INPUTS
from .sizes import ModelSizes

__all__ = ["MISTRAL"]

MISTRAL = ModelFamily(
    "mistral",
    "MistralForCausalLM",
    LLAMA_INPUTS,
    public={
        "Mistral-7B": ModelSizes(4096, 14336, 32, 8, 128, 32),
        "Mistral-Nemo-12B": ModelSizes(5120, 14336, 32, 8, 128, 40),
        "Mistral-Small-24B": ModelSizes(5120, 32768, 32, 8, 128, 40),
        "Mistral-Large-123B": ModelSizes(12288, 28672, 96, 8, 128, 88),
    },
)
