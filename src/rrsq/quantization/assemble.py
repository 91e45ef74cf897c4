"""Putting quantized modules where a model's linears are: for quantization and for loading alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..models import LinearInput, ModelFamily, ModelSizes
from ..nn.input import InputQuantizer
from ..nn.kv_cache import CacheScheme, KVQuantizer
from ..nn.linear import QuantizedLinear
from ..nn.rotation import OnlineHadamard
from ..recipe import CacheTensor, KVCache, Recipe
from ..rotation.rotations import Rotations
from .scheme import group_size_for, input_scheme

__all__ = ["RotationSigns", "attach_kv_quantizer", "input_rotation", "quantize_input_modules"]


class RotationSigns(nn.Module):
    """The random signs of the folded rotations, int8, kept in the checkpoint: they cannot be derived."""

    def __init__(self, rotations: Rotations) -> None:
        super().__init__()
        for name in ("residual", "head"):
            rotation = getattr(rotations, name)
            signs: Tensor | None = None if rotation is None else rotation.signs.to(torch.int8)
            self.register_buffer(f"{name}_signs", signs)


def input_rotation(entry: LinearInput, rotations: Rotations, sizes: ModelSizes) -> OnlineHadamard | None:
    """The online rotation of an input, or None."""
    if entry.name == "o" and rotations.across_heads is not None:
        return OnlineHadamard(rotations.across_heads, inner=sizes.head_dim)
    if entry.name == "down" and rotations.intermediate is not None:
        return OnlineHadamard(rotations.intermediate)
    return None


def quantize_input_modules(
    layer: nn.Module, entry: LinearInput, recipe: Recipe, rotations: Rotations, sizes: ModelSizes
) -> dict[str, QuantizedLinear]:
    """Replace the linears of one input by empty quantized ones and give their parent the input's quantizer.

    Returns:
        The new linears by name. Their weights are zero until set or loaded.
    """
    parent = layer.get_submodule(entry.parent)
    quantizer = InputQuantizer(
        input_scheme(recipe, entry, sizes),
        input_rotation(entry, rotations, sizes),
        consumers=len(entry.linears),
    )
    setattr(parent, entry.quantizer_name, quantizer)
    replaced = {}
    for name in entry.linears:
        linear = getattr(parent, name)
        out_features, in_features = linear.weight.shape
        replaced[name] = QuantizedLinear(
            in_features,
            out_features,
            group_size=group_size_for(recipe.weights.group_size, in_features),
            bias=linear.bias is not None,
            input_quantizer=quantizer,
            dtype=linear.weight.dtype,
        )
        setattr(parent, name, replaced[name])
    return replaced


def attach_kv_quantizer(
    layer: nn.Module, family: ModelFamily, cache: KVCache, sizes: ModelSizes, rotary: nn.Module, key_bits: int
) -> KVQuantizer:
    """Give a decoder layer's attention a quantized KV cache; ``key_bits`` overrides the recipe's."""
    quantizer = KVQuantizer(
        _cache_scheme(cache.keys, key_bits),
        _cache_scheme(cache.values, cache.values.bits),
        sizes.kv_heads,
        sizes.head_dim,
        rotary,
    )
    quantizer.attach(layer.get_submodule(family.attention))
    return quantizer


def _cache_scheme(tensor: CacheTensor, bits: int) -> CacheScheme:
    return CacheScheme(bits, tensor.group_size, tensor.zero_point, tensor.rotate, tensor.offset == "mean")
