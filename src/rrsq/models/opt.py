"""OPT: LayerNorm, biases, an MLP without gate and with ReLU, learned positions."""

from __future__ import annotations

from typing import Any

from .family import LAYER_NORM, LinearInput, ModelFamily
from .sizes import ModelSizes

__all__ = ["OPT"]


def _not_covered(config: Any) -> str | None:
    if config.word_embed_proj_dim != config.hidden_size:
        return "its embedding is projected (word_embed_proj_dim is not hidden_size), as in OPT-350m"
    if not config.do_layer_norm_before or config._remove_final_layer_norm:
        return "its norms do not stand before attention, MLP and output head (do_layer_norm_before)"
    return None


OPT = ModelFamily(
    "opt",
    "OPTForCausalLM",
    (
        LinearInput("qkv", "self_attn", ("q_proj", "k_proj", "v_proj"), norm="self_attn_layer_norm"),
        LinearInput("o", "self_attn", ("out_proj",)),
        LinearInput("gate_up", "", ("fc1",), norm="final_layer_norm"),
        LinearInput("down", "", ("fc2",)),
    ),
    norm=LAYER_NORM,
    embedding="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    layers="model.decoder.layers",
    final_norm="model.decoder.final_layer_norm",
    rotary=None,
    intermediate_size="ffn_dim",
    not_covered=_not_covered,
    public={
        "OPT-125m": ModelSizes(768, 3072, 12, 12, 64, 12),
        "OPT-1.3b": ModelSizes(2048, 8192, 32, 32, 64, 24),
        "OPT-2.7b": ModelSizes(2560, 10240, 32, 32, 80, 32),
        "OPT-6.7b": ModelSizes(4096, 16384, 32, 32, 128, 32),
        "OPT-13b": ModelSizes(5120, 20480, 40, 40, 128, 40),
        "OPT-30b": ModelSizes(7168, 28672, 56, 56, 128, 48),
        "OPT-66b": ModelSizes(9216, 36864, 72, 72, 128, 64),
    },
)
