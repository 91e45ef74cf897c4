"""A tiny configuration of each family that vLLM serves, of sizes that two and four processes can share.

They are odd in other respects: shards are no whole packing blocks, groups of weights lie in two of them, and
there are fewer key heads than processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import (
    ArceeConfig,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
)

from tiny_families import COMMON, GEMMA3_ROPE, LLAMA3_ROPE

__all__ = ["DENSE", "EXPERTS", "SERVABLE", "llama"]

SIZES: dict[str, Any] = {
    **COMMON,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}


def llama() -> PretrainedConfig:
    """Llama with biases everywhere."""
    return LlamaConfig(
        **SIZES, head_dim=12, attention_bias=True, mlp_bias=True, rope_parameters=dict(LLAMA3_ROPE)
    )


DENSE: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": llama,
    "mistral": lambda: MistralConfig(**SIZES, head_dim=12, sliding_window=8),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=12, tie_word_embeddings=True),
    "phi3": lambda: Phi3Config(
        **SIZES,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    ),
    "gemma": lambda: GemmaConfig(**SIZES, head_dim=12),
    "gemma2": lambda: Gemma2Config(
        **SIZES,
        head_dim=12,
        sliding_window=8,
        query_pre_attn_scalar=20,
        attention_bias=True,
        attn_logit_softcapping=4.0,
        final_logit_softcapping=6.0,
    ),
    "gemma3_text": lambda: Gemma3TextConfig(
        **SIZES,
        head_dim=12,
        sliding_window=8,
        query_pre_attn_scalar=20,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={name: dict(rope) for name, rope in GEMMA3_ROPE.items()},
    ),
    "olmo2": lambda: Olmo2Config(**{**SIZES, "num_key_value_heads": 4}),
    "granite": lambda: GraniteConfig(
        **SIZES,
        attention_multiplier=0.2,
        residual_multiplier=0.7,
        embedding_multiplier=3.0,
        logits_scaling=1.5,
    ),
    "seed_oss": lambda: SeedOssConfig(**SIZES, head_dim=12, attention_bias=True),
    "arcee": lambda: ArceeConfig(**SIZES, head_dim=12),
    "smollm3": lambda: SmolLM3Config(**SIZES, no_rope_layers=[1, 0]),
    "exaone4": lambda: Exaone4Config(**SIZES, head_dim=12, sliding_window=8, sliding_window_pattern=2),
    "olmo3": lambda: Olmo3Config(
        **{**SIZES, "num_key_value_heads": 4},
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "opt": lambda: OPTConfig(
        **{key: value for key, value in COMMON.items() if key != "initializer_range"},
        init_std=0.1,
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        word_embed_proj_dim=64,
        dropout=0.0,
    ),
}
EXPERTS: dict[str, Callable[[], PretrainedConfig]] = {
    "mixtral": lambda: MixtralConfig(**SIZES, head_dim=12, num_local_experts=5, num_experts_per_tok=2),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **SIZES,
        moe_intermediate_size=40,
        shared_expert_intermediate_size=48,
        num_experts=6,
        num_experts_per_tok=3,
        mlp_only_layers=[1],
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SIZES,
        head_dim=12,
        moe_intermediate_size=40,
        num_experts=7,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=2,
    ),
}
SERVABLE = {**DENSE, **EXPERTS}
