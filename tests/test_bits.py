"""What a recipe is said to cost, against the bytes of a checkpoint and of a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rrsq.bits import activation_bits, cache_bits, weight_bits
from rrsq.runtime.kv_cache.quantizer import KVQuantizer
from rrsq.runtime.modules.linear import QuantizedLinear
from tiny_quantized import quantize_tiny, recipe_of


@pytest.mark.parametrize("name", ["rrs-w4a4kv4", "quarot-w4a4kv4", "rtn-w4a4"])
def test_bits_of_weights_are_those_stored(tiny_llama_dir: Path, name: str) -> None:
    recipe = recipe_of(name)
    model: Any = quantize_tiny(tiny_llama_dir, recipe).model
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len(linears) == 3 * 7
    for linear in linears:
        stored = (linear.weight_packed, linear.weight_scale, linear.weight_multiplier)
        bits = 8 * sum(tensor.numel() * tensor.element_size() for tensor in stored if tensor is not None)
        weights = 2 * linear.weight_packed.numel()
        channels = 2 * linear.weight_packed.shape[1]
        assert bits / weights == pytest.approx(weight_bits(recipe, channels))


def test_bits_of_a_cache_are_those_stored(tiny_llama_dir: Path) -> None:
    # The tiny heads of 16 hold one group each, so the recipe's groups are made as small.
    groups = ("kv_cache.keys.group_size=16", "kv_cache.values.group_size=16")
    recipe = recipe_of("rrs-w4a4kv4", groups)
    model: Any = quantize_tiny(tiny_llama_dir, recipe).model
    quantizer = next(module for module in model.modules() if isinstance(module, KVQuantizer))
    keys, values = torch.randn(2, 1, 2, 10, 16)
    stored = quantizer.encode(keys, values, torch.arange(10)[None, None, :, None])
    bits = 8 * sum(t.numel() * t.element_size() for name, t in stored.items() if name != "positions")
    assert bits / (keys.numel() + values.numel()) == cache_bits(recipe)


def test_what_is_not_quantized_costs_16_bits() -> None:
    only_cache = recipe_of("w16a16kv4")
    assert weight_bits(only_cache) == activation_bits(only_cache) == 16
    assert cache_bits(recipe_of("rtn-w4a4")) == 16
