"""Llama 2, 3, 3.1 and 3.2: RMSNorm before attention and before a gated MLP, rotary position embeddings."""

from __future__ import annotations

from .family import LinearInput, ModelFamily
from .sizes import ModelSizes

__all__ = ["LLAMA", "LLAMA_INPUTS"]

LLAMA_INPUTS = (
    LinearInput("qkv", "self_attn", ("q_proj", "k_proj", "v_proj"), norm="input_layernorm"),
    LinearInput("o", "self_attn", ("o_proj",)),
    LinearInput("gate_up", "mlp", ("gate_proj", "up_proj"), norm="post_attention_layernorm"),
    LinearInput("down", "mlp", ("down_proj",)),
)

LLAMA = ModelFamily(
    "llama",
    "LlamaForCausalLM",
    LLAMA_INPUTS,
    public={
        "SmolLM2-135M": ModelSizes(576, 1536, 9, 3, 64, 30),
        "Llama-3.2-1B": ModelSizes(2048, 8192, 32, 8, 64, 16),
        "Llama-3.2-3B": ModelSizes(3072, 8192, 24, 8, 128, 28),
        "Llama-2-7B": ModelSizes(4096, 11008, 32, 32, 128, 32),
        "Llama-3-8B": ModelSizes(4096, 14336, 32, 8, 128, 32),
        "Llama-2-13B": ModelSizes(5120, 13824, 40, 40, 128, 40),
        "Llama-3-70B": ModelSizes(8192, 28672, 64, 8, 128, 80),
        "Llama-3.1-405B": ModelSizes(16384, 53248, 128, 8, 128, 126),
    },
    tested_on=("SmolLM2-135M",),
)
