"""A tiny random model of each family, with the features that set it apart and sizes that are not round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    ArceeConfig,
    AutoModelForCausalLM,
    Exaone4Config,
    Gemma2Config,
    Gemma3Config,
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
    Starcoder2Config,
)

from rrsq.runtime.kv_cache.attention import cap_attention
from tiny_quantized import VOCABULARY_SIZE

WINDOW = 8
LONG = 40  # Tokens beyond which the model with longrope takes other angles.
COMMON = {
    "vocab_size": VOCABULARY_SIZE,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
LLAMA_LIKE = {
    **COMMON,
    "hidden_size": 60,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
}

# By name: a configuration. The name is the family's model type, with what is special behind a blank.
TINY: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(
        **LLAMA_LIKE, head_dim=20, attention_bias=True, mlp_bias=True, rope_parameters=dict(LLAMA3_ROPE)
    ),
    "mistral": lambda: MistralConfig(**LLAMA_LIKE, head_dim=12, sliding_window=WINDOW),
    "qwen2": lambda: Qwen2Config(**{**LLAMA_LIKE, "hidden_size": 56}, tie_word_embeddings=True),
    "qwen2 sliding": lambda: Qwen2Config(
        **LLAMA_LIKE, head_dim=12, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3": lambda: Qwen3Config(**LLAMA_LIKE, head_dim=24, attention_bias=True, tie_word_embeddings=True),
    "phi3": lambda: Phi3Config(
        **{**LLAMA_LIKE, "hidden_size": 48},
        sliding_window=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    ),
    "phi3 longrope": lambda: Phi3Config(
        **{**LLAMA_LIKE, "hidden_size": 48},
        original_max_position_embeddings=LONG,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 100.0,
            "short_factor": [1.0] * 6,
            "long_factor": [2.0, 2.2, 2.4, 2.6, 2.8, 3.0],
        },
    ),
    "mixtral": lambda: MixtralConfig(
        **{**LLAMA_LIKE, "intermediate_size": 44},
        head_dim=12,
        sliding_window=WINDOW,
        num_local_experts=5,
        num_experts_per_tok=2,
    ),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **{**LLAMA_LIKE, "hidden_size": 56, "num_hidden_layers": 3},
        moe_intermediate_size=20,
        shared_expert_intermediate_size=48,
        num_experts=6,
        num_experts_per_tok=3,
        mlp_only_layers=[1],
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **LLAMA_LIKE,
        head_dim=24,
        moe_intermediate_size=28,
        num_experts=7,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=2,
        attention_bias=True,
    ),
    "gemma": lambda: GemmaConfig(
        **{**LLAMA_LIKE, "num_key_value_heads": 1}, head_dim=16, attention_bias=True
    ),
    "gemma2": lambda: Gemma2Config(
        **{**LLAMA_LIKE, "num_hidden_layers": 3},
        head_dim=16,
        sliding_window=WINDOW,
        query_pre_attn_scalar=20,
        attention_bias=True,
        attn_logit_softcapping=4.0,
        final_logit_softcapping=6.0,
    ),
    "gemma3_text": lambda: Gemma3TextConfig(
        **{**LLAMA_LIKE, "num_hidden_layers": 3},
        head_dim=16,
        sliding_window=WINDOW,
        query_pre_attn_scalar=20,
        attention_bias=True,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        rope_parameters={name: dict(rope) for name, rope in GEMMA3_ROPE.items()},
    ),
    "gemma3": lambda: Gemma3Config(
        text_config=TINY["gemma3_text"]().to_dict(),
        vision_config={
            "hidden_size": 20,
            "intermediate_size": 28,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
        image_token_index=VOCABULARY_SIZE - 3,
        boi_token_index=VOCABULARY_SIZE - 2,
        eoi_token_index=VOCABULARY_SIZE - 1,
    ),
    "olmo2": lambda: Olmo2Config(**{**LLAMA_LIKE, "hidden_size": 56}, attention_bias=True),
    "olmo3": lambda: Olmo3Config(
        **{**LLAMA_LIKE, "hidden_size": 56, "num_hidden_layers": 3},
        attention_bias=True,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        rope_parameters={name: dict(rope) for name, rope in GEMMA3_ROPE.items()},
    ),
    "exaone4": lambda: Exaone4Config(
        **{**LLAMA_LIKE, "num_hidden_layers": 3},
        head_dim=12,
        sliding_window=WINDOW,
        sliding_window_pattern=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "granite": lambda: GraniteConfig(
        **{**LLAMA_LIKE, "hidden_size": 56},
        attention_bias=True,
        mlp_bias=True,
        embedding_multiplier=3.0,
        attention_multiplier=0.2,
        residual_multiplier=0.7,
        logits_scaling=1.5,
        tie_word_embeddings=True,
    ),
    "seed_oss": lambda: SeedOssConfig(
        **LLAMA_LIKE, head_dim=20, attention_bias=True, attention_out_bias=True, mlp_bias=True
    ),
    "smollm3": lambda: SmolLM3Config(
        **{**LLAMA_LIKE, "hidden_size": 56, "num_hidden_layers": 3},
        attention_bias=True,
        mlp_bias=True,
        no_rope_layers=[1, 0, 1],
        use_sliding_window=True,
        sliding_window=WINDOW,
        tie_word_embeddings=True,
    ),
    "arcee": lambda: ArceeConfig(**LLAMA_LIKE, head_dim=20, attention_bias=True, mlp_bias=True),
    "starcoder2": lambda: Starcoder2Config(
        **{**LLAMA_LIKE, "hidden_size": 56},
        sliding_window=WINDOW,
        use_bias=True,
        residual_dropout=0.1,
        embedding_dropout=0.1,
    ),
    "opt": lambda: OPTConfig(
        **{key: value for key, value in COMMON.items() if key != "initializer_range"},
        init_std=0.1,
        hidden_size=60,
        ffn_dim=88,
        num_hidden_layers=2,
        num_attention_heads=5,
        word_embed_proj_dim=60,
        dropout=0.0,
    ),
}


def tiny_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The seeded random model of a name in :data:`TINY`."""
    return random_model(TINY[name]()).to(dtype)


def random_model(config: PretrainedConfig) -> Any:
    """A seeded random float32 model with uneven norm gains and random biases, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        cap_attention(model)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if path.endswith("bias"):
                    parameter.copy_(0.5 * torch.randn_like(parameter))
                elif "norm" in path:
                    parameter.copy_(torch.exp(0.5 * torch.randn_like(parameter)))
    return model
