"""OLMo-2: norms only behind attention and MLP, and over all queries and all keys.

The norms behind have gains, so that R1 cannot be folded; attention and MLP read the stream as it is.
"""

from __future__ import annotations

from .family import LinearInput, ModelFamily
from .sizes import ModelSizes

__all__ = ["OLMO2"]

OLMO2 = ModelFamily(
    "olmo2",
    "Olmo2ForCausalLM",
    (
        LinearInput("qkv", "self_attn", ("q_proj", "k_proj", "v_proj")),
        LinearInput("o", "self_attn", ("o_proj",), output_norm="post_attention_layernorm"),
        LinearInput("gate_up", "mlp", ("gate_proj", "up_proj")),
        LinearInput("down", "mlp", ("down_proj",), output_norm="post_feedforward_layernorm"),
    ),
    public={
        "OLMo-2-1B": ModelSizes(2048, 8192, 16, 16, 128, 16),
        "OLMo-2-7B": ModelSizes(4096, 11008, 32, 32, 128, 32),
        "OLMo-2-13B": ModelSizes(5120, 13824, 40, 40, 128, 40),
        "OLMo-2-32B": ModelSizes(5120, 27648, 40, 8, 128, 64),
    },
)
