"""EXAONE 4: norms behind attention and MLP as in OLMo-2, and of each head's queries and keys.

Where most layers have a sliding window, those that see everything do without RoPE.
"""

from __future__ import annotations

from typing import Any

from .family import ModelFamily
from .olmo2 import OLMO2
from .sizes import ModelSizes

__all__ = ["EXAONE4"]


def _rotates_keys(config: Any, index: int) -> bool:
    return config.sliding_window is None or config.layer_types[index] == "sliding_attention"


EXAONE4 = ModelFamily(
    "exaone4",
    "Exaone4ForCausalLM",
    OLMO2.inputs,
    rotates_keys=_rotates_keys,
    public={
        "EXAONE-4.0-1.2B": ModelSizes(2048, 4096, 32, 8, 64, 30),
        "EXAONE-4.0-32B": ModelSizes(5120, 27392, 40, 8, 128, 64),
    },
)
