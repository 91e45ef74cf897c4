"""StarCoder2: LayerNorms, biases everywhere, an MLP without gate."""

from __future__ import annotations

from .family import LAYER_NORM, LinearInput, ModelFamily
from .llama import LLAMA_INPUTS
from .sizes import ModelSizes

__all__ = ["STARCODER2"]

STARCODER2 = ModelFamily(
    "starcoder2",
    "Starcoder2ForCausalLM",
    (
        *LLAMA_INPUTS[:2],
        LinearInput("gate_up", "mlp", ("c_fc",), norm="post_attention_layernorm"),
        LinearInput("down", "mlp", ("c_proj",)),
    ),
    norm=LAYER_NORM,
    public={
        "StarCoder2-3B": ModelSizes(3072, 12288, 24, 2, 128, 30),
        "StarCoder2-7B": ModelSizes(4608, 18432, 36, 4, 128, 32),
        "StarCoder2-15B": ModelSizes(6144, 24576, 48, 4, 128, 40),
    },
    served=False,
)
