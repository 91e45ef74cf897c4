"""Putting quantized modules where a model's linears are: for quantization and for loading alike."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..models import LinearInput, ModelFamily, ModelSizes
from ..recipe import CacheTensor, KVCache, Recipe, Weights
from .kv_cache.quantizer import CacheScheme, KVQuantizer
from .kv_cache.rope import KeyRotary
from .modules.embedding import Int4Embedding, Int8Embedding, QuantizedEmbedding, SharedHead, embedding_factor
from .modules.experts import Experts, QuantizedExpertLinear
from .modules.input import InputQuantizer, InputScheme
from .modules.int8_linear import Int8Linear
from .modules.linear import FusedLinears, PackedWeight, QuantizedLinear
from .modules.rotation import RotatedLinear, online_rotation
from .rotation.rotations import Rotations
from .scheme import (
    Treatment,
    changes_linears,
    embedding_is_kept,
    group_size_for,
    head_is_kept,
    head_shares_codes,
    input_scheme,
)

__all__ = [
    "RotationSigns",
    "attach_kv_quantizer",
    "key_rotary",
    "open_experts",
    "quantize_embedding_module",
    "quantize_head_module",
    "quantize_input_modules",
    "settle",
    "treated_inputs",
]


class RotationSigns(nn.Module):
    """The random signs of the folded rotations, int8, kept in the checkpoint: they cannot be derived."""

    def __init__(self, rotations: Rotations) -> None:
        super().__init__()
        for name in ("residual", "head"):
            rotation = getattr(rotations, name)
            signs: Tensor | None = None if rotation is None else rotation.signs.to(torch.int8)
            self.register_buffer(f"{name}_signs", signs)


def open_experts(layer: nn.Module, family: ModelFamily) -> None:
    """Put :class:`~.modules.experts.Experts` in the place of a decoder layer's experts, with their weights.

    Their linears are modules then, and can be folded and quantized like others.
    """
    for path in {entry.parent for entry in family.inputs_in(layer) if entry.experts}:
        module = layer.get_submodule(path)
        if not isinstance(module, Experts):
            layer.set_submodule(path, Experts.of(module))


def treated_inputs(layer: nn.Module, family: ModelFamily, recipe: Recipe) -> tuple[LinearInput, ...]:
    """The inputs of a decoder layer that a recipe may rotate or quantize; its experts are opened for that."""
    if not changes_linears(recipe):
        return ()
    open_experts(layer, family)
    return family.inputs_in(layer)


def quantize_input_modules(
    layer: nn.Module, entry: LinearInput, how: Treatment, rotations: Rotations
) -> dict[str, Any]:
    """Replace linears of one input by empty quantized ones and give their parent the input's quantizer.

    Linears that stay in full precision are put behind the input's online rotation, if they are not yet.

    Returns:
        The new linears by name. Their weights are zero until set or loaded.
    """
    parent: Any = layer.get_submodule(entry.parent)
    originals: dict[str, Any] = {name: getattr(parent, name) for name in entry.linears}
    channels = originals[entry.linears[0]].weight.shape[-1]
    rotation = online_rotation(entry, rotations, channels)
    for name in entry.linears:
        linear = originals[name]
        if name not in how.linears and rotation is not None and not isinstance(linear, RotatedLinear):
            setattr(parent, name, RotatedLinear(rotation, linear))
    if not how.linears:
        return {}
    scheme = input_scheme(how.activations, entry, channels)
    quantizer = InputQuantizer(scheme, rotation)
    setattr(parent, entry.quantizer_name, quantizer)
    replaced = {}
    for name in how.linears:
        replaced[name] = _empty(originals[name], how.weights, quantizer)
        setattr(parent, name, replaced[name])
    biases = [linear.bias is not None for linear in replaced.values() if isinstance(linear, QuantizedLinear)]
    if len(biases) > 1 and len(set(biases)) == 1:
        others = tuple(name for name in entry.linears if name not in replaced)
        setattr(parent, entry.fused_name, FusedLinears(parent, how.linears, others))
    return replaced


def _empty(linear: Any, weights: Weights, quantizer: InputQuantizer) -> PackedWeight:
    """What takes the place of a linear, or of the linears of all experts; its weights are zero."""
    *experts, out_features, in_features = linear.weight.shape
    group_size = group_size_for(weights.group_size, in_features)
    if experts:
        return QuantizedExpertLinear(
            experts[0],
            in_features,
            out_features,
            group_size=group_size,
            signed=weights.signed,
            input_quantizer=quantizer,
        )
    return QuantizedLinear(
        in_features,
        out_features,
        group_size=group_size,
        signed=weights.signed,
        bias=linear.bias is not None,
        input_quantizer=quantizer,
        dtype=linear.weight.dtype,
    )


def quantize_embedding_module(
    model: nn.Module, family: ModelFamily, recipe: Recipe
) -> QuantizedEmbedding | None:
    """Replace the embedding by an empty quantized one; None, and nothing is done, where it is kept.

    Raises:
        RecipeError: the embedding is of a kind that cannot be quantized.
    """
    if embedding_is_kept(recipe, family):
        return None
    embedding: Any = model.get_submodule(family.embedding)
    shape, dtype = tuple(embedding.weight.shape), embedding.weight.dtype
    factor = embedding_factor(embedding)
    new: QuantizedEmbedding
    if recipe.embedding.bits == 8:
        new = Int8Embedding(shape, factor=factor, dtype=dtype)
    else:
        group_size = group_size_for(recipe.embedding.group_size, shape[1])
        blocks = recipe.embedding.blocks
        new = Int4Embedding(shape, group_size=group_size, blocks=blocks, factor=factor, dtype=dtype)
    model.set_submodule(family.embedding, new)
    return new


def quantize_head_module(model: nn.Module, family: ModelFamily, recipe: Recipe) -> nn.Module | None:
    """Replace the output head by an empty quantized one, or by one that shares a tied embedding's codes.

    Returns:
        The empty one; None where there is none to fill, because the head is kept or shares.
    """
    if head_shares_codes(recipe, family, model.config):
        model.set_submodule(family.head, SharedHead(model.get_submodule(family.embedding)))
        tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
        tied.pop(f"{family.head}.weight", None)  # transformers need not tie what is one.
        return None
    if head_is_kept(recipe, family):
        return None
    head: Any = model.get_submodule(family.head)
    out_features, channels = head.weight.shape
    bias, dtype = head.bias is not None, head.weight.dtype
    new: nn.Module
    if recipe.head.bits == 8:
        new = Int8Linear(channels, out_features, bias=bias, dtype=dtype)
    else:
        new = QuantizedLinear(
            channels,
            out_features,
            group_size=group_size_for(recipe.weights.group_size, channels),
            signed=recipe.weights.signed,
            bias=bias,
            input_quantizer=InputQuantizer(InputScheme(channels)),
            dtype=dtype,
        )
    model.set_submodule(family.head, new)
    return new


def settle(model: nn.Module) -> None:
    """Do once what a model would do in its first forward pass, so that a compiled one need not trace it.

    To be called when its tensors are loaded, where they stay.
    """
    for module in model.modules():
        if isinstance(module, FusedLinears):
            module.join()
        elif isinstance(module, PackedWeight) and module.input_quantizer.rotation is not None:
            module.input_quantizer.rotation.follow(module.weight_packed.device)
        elif isinstance(module, RotatedLinear):
            module.rotation.follow(module.weight.device)
        attention_cache = getattr(module, "kv_quantizer", None)
        if isinstance(attention_cache, KVQuantizer):
            attention_cache.follow(next(_tensors(module)).device)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())


def key_rotary(model: nn.Module, family: ModelFamily, index: int) -> KeyRotary | None:
    """RoPE as the attention of one layer applies it, or None where there is none."""
    config: Any = model.config
    text = config.get_text_config()
    if family.rotary is None or not family.rotates_keys(text, index):
        return None
    layer_type = text.layer_types[index] if family.rotary_by_layer_type else None
    return KeyRotary.of(type(model.get_submodule(family.rotary)), text, layer_type)


def attach_kv_quantizer(
    layer: nn.Module,
    family: ModelFamily,
    cache: KVCache,
    sizes: ModelSizes,
    rotary: KeyRotary | None,
    key_bits: int,
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
    return CacheScheme(
        bits,
        tensor.group_size,
        tensor.zero_point,
        tensor.rotate,
        tensor.offset != "none",
        tensor.signed,
        tensor.offset == "sink",
        tensor.balance,
    )
