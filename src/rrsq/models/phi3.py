"""Phi-3 and Phi-4: fused projections; some sizes have partial rotary embeddings or a sliding window."""

from __future__ import annotations

from .family import LinearInput, ModelFamily
from .sizes import ModelSizes

__all__ = ["PHI3"]

PHI3 = ModelFamily(
    "phi3",
    "Phi3ForCausalLM",
    (
        LinearInput("qkv", "self_attn", ("qkv_proj",), norm="input_layernorm"),
        LinearInput("o", "self_attn", ("o_proj",)),
        LinearInput("gate_up", "mlp", ("gate_up_proj",), norm="post_attention_layernorm"),
        LinearInput("down", "mlp", ("down_proj",)),
    ),
    value="qkv_proj",
    public={
        "Phi-3-mini": ModelSizes(3072, 8192, 32, 32, 96, 32),
        "Phi-4-mini": ModelSizes(3072, 8192, 24, 8, 128, 32),
        "Phi-3-medium": ModelSizes(5120, 17920, 40, 10, 128, 40),
        "Phi-4": ModelSizes(5120, 17920, 40, 10, 128, 40),
    },
)
