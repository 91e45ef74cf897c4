"""Seed-OSS: Llama with biases of queries, keys and values; its heads together are wider than the stream."""

from __future__ import annotations

from .family import ModelFamily
from .llama import LLAMA_INPUTS
from .sizes import ModelSizes

__all__ = ["SEED_OSS"]

SEED_OSS = ModelFamily(
    "seed_oss",
    "SeedOssForCausalLM",
    LLAMA_INPUTS,
    public={
        "Seed-OSS-36B": ModelSizes(5120, 27648, 80, 8, 128, 64),
    },
)
