"""Llama: RMSNorm before attention and before a gated MLP, rotary position embeddings."""

from __future__ import annotations

from .family import LinearInput, ModelFamily

__all__ = ["LLAMA", "LLAMA_INPUTS"]

LLAMA_INPUTS = (
    LinearInput("qkv", "self_attn", ("q_proj", "k_proj", "v_proj"), norm="input_layernorm"),
    LinearInput("o", "self_attn", ("o_proj",)),
    LinearInput("gate_up", "mlp", ("gate_proj", "up_proj"), norm="post_attention_layernorm"),
    LinearInput("down", "mlp", ("down_proj",)),
)

LLAMA = ModelFamily("llama", "LlamaForCausalLM", LLAMA_INPUTS, tested_on=("SmolLM2-135M",))
