"""Mixtral: Mistral with a mixture of experts in the place of every MLP."""

from __future__ import annotations

from .family import LinearInput, ModelFamily
from .llama import LLAMA_INPUTS
from .sizes import ModelSizes

__all__ = ["EXPERT_INPUTS", "MIXTRAL"]

EXPERT_INPUTS = (
    LinearInput(
        "gate_up",
        "mlp.experts",
        ("gate_up_proj",),
        norm="post_attention_layernorm",
        full_precision=("mlp.gate",),
        experts=True,
    ),
    LinearInput("down", "mlp.experts", ("down_proj",), experts=True),
)

MIXTRAL = ModelFamily(
    "mixtral",
    "MixtralForCausalLM",
    (*LLAMA_INPUTS[:2], *EXPERT_INPUTS),  # Its attention is that of Llama.
    public={
        "Mixtral-8x7B": ModelSizes(4096, 14336, 32, 8, 128, 32),
        "Mixtral-8x22B": ModelSizes(6144, 16384, 48, 8, 128, 56),
    },
)
