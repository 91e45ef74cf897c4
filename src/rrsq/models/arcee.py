"""Arcee's AFM: Llama with an MLP without gate, of squared ReLU."""

from __future__ import annotations

from .family import LinearInput, ModelFamily
from .llama import LLAMA_INPUTS
from .sizes import ModelSizes

__all__ = ["ARCEE"]

ARCEE = ModelFamily(
    "arcee",
    "ArceeForCausalLM",
    (
        *LLAMA_INPUTS[:2],
        LinearInput("gate_up", "mlp", ("up_proj",), norm="post_attention_layernorm"),
        LinearInput("down", "mlp", ("down_proj",)),
    ),
    public={
        "AFM-4.5B": ModelSizes(2560, 18432, 20, 4, 128, 36),
    },
)
