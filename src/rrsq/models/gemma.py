"""Gemma 1: Llama with a norm gain of ``1 + weight`` and a scaled embedding (the scale commutes with R1)."""

from __future__ import annotations

from typing import Any

from .family import RMS_NORM_ONE_PLUS, ModelFamily
from .llama import LLAMA_INPUTS
from .sizes import ModelSizes

__all__ = ["GEMMA", "bidirectional"]


def bidirectional(config: Any) -> str | None:
    """Why a Gemma of any generation is not covered: a model that embeds text sees the tokens to come."""
    if getattr(config.get_text_config(), "use_bidirectional_attention", False):
        return "its attention is bidirectional, so it does not generate text"
    return None


GEMMA = ModelFamily(
    "gemma",
    "GemmaForCausalLM",
    LLAMA_INPUTS,
    norm=RMS_NORM_ONE_PLUS,
    needs_bos=True,
    not_covered=bidirectional,
    public={
        "Gemma-2B": ModelSizes(2048, 16384, 8, 1, 256, 18),
        "Gemma-7B": ModelSizes(3072, 24576, 16, 16, 256, 28),
    },
)
