"""Gemma 3: Gemma 2 with norms of queries and keys, and other angles in sliding layers.

From 4B up it sees: the language model is part of a larger one, whose vision tower stays as it is.
"""

from __future__ import annotations

from dataclasses import replace

from .family import RMS_NORM_ONE_PLUS, ModelFamily
from .gemma import bidirectional
from .gemma2 import GEMMA2_INPUTS
from .sizes import ModelSizes

__all__ = ["GEMMA3", "GEMMA3_TEXT"]

GEMMA3_TEXT = ModelFamily(
    "gemma3_text",
    "Gemma3ForCausalLM",
    GEMMA2_INPUTS,
    norm=RMS_NORM_ONE_PLUS,
    rotary_by_layer_type=True,
    needs_bos=True,
    not_covered=bidirectional,
    public={
        "Gemma-3-270M": ModelSizes(640, 2048, 4, 1, 256, 18),
        "Gemma-3-1B": ModelSizes(1152, 6912, 4, 1, 256, 26),
    },
)

GEMMA3 = replace(
    GEMMA3_TEXT,
    model_type="gemma3",
    architecture="Gemma3ForConditionalGeneration",
    embedding="model.language_model.embed_tokens",
    layers="model.language_model.layers",
    final_norm="model.language_model.norm",
    rotary="model.language_model.rotary_emb",
    public={
        "Gemma-3-4B": ModelSizes(2560, 10240, 8, 4, 256, 34),
        "Gemma-3-12B": ModelSizes(3840, 15360, 16, 8, 256, 48),
        "Gemma-3-27B": ModelSizes(5376, 21504, 32, 16, 128, 62),
    },
)
