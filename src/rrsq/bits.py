"""What the numbers of a recipe cost in bits, scales and multipliers included."""

from __future__ import annotations

from .recipe import Recipe

__all__ = ["activation_bits", "cache_bits", "linear_bytes", "weight_bits"]

SCALE_BITS = 32
MULTIPLIER_BITS = 8
# Input channels of a typical linear, for the share of its rows' scales.
CHANNELS = 4096


def weight_bits(recipe: Recipe, channels: int = CHANNELS) -> float:
    """Stored bits of a weight of a quantized linear with ``channels`` inputs.

    A float32 scale a row, and a byte for the multiplier of each group.
    """
    weights = recipe.weights
    if weights.bits == 16:
        return 16.0
    multipliers = 0.0 if weights.group_size is None else MULTIPLIER_BITS / weights.group_size
    return weights.bits + multipliers + SCALE_BITS / channels


def linear_bytes(channels: int, rows: int, group_size: int | None) -> int:
    """Stored bytes of a 4-bit weight ``[rows, channels]``: codes, a scale a row, a multiplier a group."""
    groups = 0 if group_size is None else channels // group_size
    return rows * (channels // 2 + SCALE_BITS // 8 + groups * MULTIPLIER_BITS // 8)


def activation_bits(recipe: Recipe) -> int:
    """Bits of an activation's code; its scales live only while a product is computed."""
    return recipe.activations.bits


def cache_bits(recipe: Recipe) -> float:
    """Stored bits of a cache entry, the mean of keys and values; 16 where the cache is not quantized."""
    cache = recipe.kv_cache
    return 16.0 if cache is None else (cache.keys.bits_per_entry + cache.values.bits_per_entry) / 2
