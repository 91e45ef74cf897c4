"""Qwen2 and Qwen2.5: Llama with biases on q, k and v."""

from __future__ import annotations

from .family import ModelFamily
from .llama import LLAMA_INPUTS

__all__ = ["QWEN2"]

QWEN2 = ModelFamily("qwen2", "Qwen2ForCausalLM", LLAMA_INPUTS, tested_on=("Qwen2.5-Coder-0.5B",))
