"""What a budget chooses among: the sections that a recipe may have at each linear input, and their cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...bits import linear_bytes
from ...errors import RecipeError
from ...models import LinearInput, ModelFamily
from ...recipe import Activations, Embedding, Head, Recipe, Weights
from ...runtime.rotation.rotations import make_rotations
from ...runtime.scheme import embedding_is_kept, group_size_for, is_kept, keeps_tie, sections_at

__all__ = ["HEAD_BITS", "InputChoices", "ModelChoices", "model_choices"]

GROUP_SIZES = (None, 128, 64, 32, 16)
"""Of the weights, besides the recipe's own; smaller ones have no kernel."""
HEAD_BITS = (4, 8, 16)


@dataclass(frozen=True)
class InputChoices:
    """One input of one decoder layer.

    Attributes:
        layer: index of the decoder layer.
        path: of the input, from the decoder layer, such as ``mlp.down``.
        linears: attribute names of those that no pattern of the recipe keeps.
        channels, rows: of the input, and of those linears together.
        weights: first the recipe's own section, then the others.
        activations: the same.
    """

    layer: int
    path: str
    linears: tuple[str, ...]
    channels: int
    rows: int
    weights: tuple[Weights, ...]
    activations: tuple[Activations, ...]

    @property
    def elements(self) -> int:
        """Weights that read the input."""
        return self.channels * self.rows

    def stored(self, weights: Weights, itemsize: int) -> int:
        """Bytes of the linears; ``itemsize`` is that of a weight that is not quantized."""
        if weights.bits == 16:
            return itemsize * self.elements
        return linear_bytes(self.channels, self.rows, group_size_for(weights.group_size, self.channels))


@dataclass(frozen=True)
class ModelChoices:
    """A whole model.

    Attributes:
        inputs: in the order of the layers.
        head_bits: what the head may have; empty where the recipe keeps it by a pattern.
        head_shape: rows and channels of the head.
        head_group: channels that share a multiplier in a head of 4 bits, or None.
        tied_to: the quantized embedding whose codes a head of 16 bits has; None: it is in 16 bits.
        itemsize: bytes of a weight that is not quantized.
    """

    inputs: tuple[InputChoices, ...]
    head_bits: tuple[int, ...]
    head_shape: tuple[int, int]
    head_group: int | None
    tied_to: Embedding | None
    itemsize: int

    @property
    def elements(self) -> int:
        """Weights of all these linears and of the head, if that is chosen."""
        rows, channels = self.head_shape
        return sum(each.elements for each in self.inputs) + (rows * channels if self.head_bits else 0)

    def head_stored(self, bits: int) -> int:
        """Bytes of a head, by what the recipe says; one that is tied counts too, as the embedding."""
        rows, channels = self.head_shape
        group = self.head_group
        if bits == 16 and self.tied_to is not None:
            bits, group = self.tied_to.bits, group_size_for(self.tied_to.group_size, channels)
        if bits == 16:
            return self.itemsize * rows * channels
        return rows * (channels + 4) if bits == 8 else linear_bytes(channels, rows, group)


def model_choices(model: Any, family: ModelFamily, recipe: Recipe, dtype: torch.dtype) -> ModelChoices:
    """What a recipe may have at each input of a model.

    Weights are in 4 bits with one scale a row or in groups of 128, 64, 32 or 16, or in 16 bits with their
    input; activations have the recipe's bits or any of 8 and 16 above those. What an override of the recipe
    leaves in 16 bits stays there, and counts; what ``modules_to_not_convert`` names is left out.

    Args:
        model: of transformers, on any device.
        family: of it.
        recipe: that is varied.
        dtype: of what is not quantized.

    Raises:
        RecipeError: the model has experts, or nothing of it is quantized.
    """
    inputs: list[InputChoices] = []
    for index, layer in enumerate(model.get_submodule(family.layers).children()):
        for entry in family.inputs_in(layer):
            if entry.experts:
                raise RecipeError(
                    "A budget of bits is for dense models; this one is a mixture of experts, of which it is"
                    " not measured yet what each bit is worth. Leave out --target-bits and"
                    " --target-activation-bits."
                )
            inputs += _input_choices(layer, index, entry, family, recipe)
    if all(each.weights[0].bits == 16 for each in inputs):
        raise RecipeError(
            f"The recipe '{recipe.name}' quantizes no linear of a layer, so there are no bits to spend."
        )
    rows, channels = model.get_submodule(family.head).weight.shape
    return ModelChoices(
        tuple(inputs),
        () if is_kept(recipe, family.head) else HEAD_BITS,
        (rows, channels),
        group_size_for(recipe.weights.group_size, channels),
        _tied_to(model, family, recipe),
        dtype.itemsize,
    )


def _tied_to(model: Any, family: ModelFamily, recipe: Recipe) -> Embedding | None:
    """The embedding's section where a head that the recipe leaves in 16 bits has its codes."""
    if not model.config.tie_word_embeddings or embedding_is_kept(recipe, family):
        return None
    rotations = make_rotations(
        recipe.rotation, family.sizes(model.config), 0, folds_residual=family.folds_residual
    )
    without = recipe.model_copy(update={"head": Head(bits=16)})
    tied = keeps_tie(without, family, folds_residual=rotations.residual is not None)
    return recipe.embedding if tied else None


def _input_choices(
    layer: nn.Module, index: int, entry: LinearInput, family: ModelFamily, recipe: Recipe
) -> Iterator[InputChoices]:
    name = family.layer_name(index)
    linears = tuple(
        linear
        for linear, path in zip(entry.linears, entry.linear_paths, strict=True)
        if not is_kept(recipe, f"{name}.{path}")
    )
    if not linears:
        return
    channels = entry.shape(layer)[0]
    parent: Any = layer.get_submodule(entry.parent)
    rows = sum(getattr(parent, linear).weight.shape[0] for linear in linears)
    weights, activations = sections_at(recipe, name, entry)
    yield InputChoices(
        index,
        entry.path,
        linears,
        channels,
        rows,
        _weight_choices(weights, channels),
        _activation_choices(activations),
    )


def _weight_choices(own: Weights, channels: int) -> tuple[Weights, ...]:
    if own.bits == 16:
        return (own,)
    found = {group_size_for(own.group_size, channels): own}
    for group_size in GROUP_SIZES:
        real = group_size_for(group_size, channels)
        if real is None or real >= GROUP_SIZES[-1]:
            found.setdefault(real, own.model_copy(update={"group_size": group_size}))
    return (*found.values(), Weights(bits=16))


def _activation_choices(own: Activations) -> tuple[Activations, ...]:
    return (own, *(Activations(bits=bits) for bits in (8, 16) if bits > own.bits))
