"""Gemma 2: norms before and behind attention and MLP, every other layer with a sliding window.

The norms behind have gains, so that R1 cannot be folded. Soft-capping of attention scores and of logits
comes after all that rotations touch.
"""

from __future__ import annotations

from .family import RMS_NORM_ONE_PLUS, LinearInput, ModelFamily
from .gemma import bidirectional
from .sizes import ModelSizes

__all__ = ["GEMMA2", "GEMMA2_INPUTS"]

GEMMA2_INPUTS = (
    LinearInput("qkv", "self_attn", ("q_proj", "k_proj", "v_proj"), norm="input_layernorm"),
    LinearInput("o", "self_attn", ("o_proj",), output_norm="post_attention_layernorm"),
    LinearInput("gate_up", "mlp", ("gate_proj", "up_proj"), norm="pre_feedforward_layernorm"),
    LinearInput("down", "mlp", ("down_proj",), output_norm="post_feedforward_layernorm"),
)

GEMMA2 = ModelFamily(
    "gemma2",
    "Gemma2ForCausalLM",
    GEMMA2_INPUTS,
    norm=RMS_NORM_ONE_PLUS,
    needs_bos=True,
    not_covered=bidirectional,
    public={
        "Gemma-2-2B": ModelSizes(2304, 9216, 8, 4, 256, 26),
        "Gemma-2-9B": ModelSizes(3584, 14336, 16, 8, 256, 42),
        "Gemma-2-27B": ModelSizes(4608, 36864, 32, 16, 128, 46),
    },
)
