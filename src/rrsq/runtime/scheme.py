"""From a recipe to what is done to each linear input."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..errors import RecipeError, did_you_mean
from ..models import LinearInput, ModelFamily
from ..recipe import Activations, Recipe, Weights
from .modules.input import InputScheme

__all__ = [
    "Treatment",
    "changes_linears",
    "check_patterns",
    "check_recipe",
    "embedding_is_kept",
    "group_size_for",
    "head_is_kept",
    "head_shares_codes",
    "input_scheme",
    "is_kept",
    "keeps_tie",
    "sections",
    "sections_at",
    "treatment",
]


@dataclass(frozen=True)
class Treatment:
    """What a recipe does to one linear input of one layer.

    Attributes:
        weights, activations: the sections that hold there.
        linears: names of the linears (as in :attr:`LinearInput.linears`) that are quantized; the others stay
            in full precision.
    """

    weights: Weights
    activations: Activations
    linears: tuple[str, ...]


def treatment(recipe: Recipe, layer_name: str, entry: LinearInput) -> Treatment:
    """How the recipe treats an input of the layer at module path ``layer_name``."""
    weights, activations = sections_at(recipe, layer_name, entry)
    if recipe.rotation is not None and recipe.rotation.blocks is not None and activations.bits != 16:
        # Blocks are rotated by the kernel of signed levels; with one scale a token there is nothing to sign.
        activations = activations.model_copy(update={"signed": True})
    kept = weights.bits == 16
    linears = tuple(
        name
        for name, path in zip(entry.linears, entry.linear_paths, strict=True)
        if not kept and not _matches(f"{layer_name}.{path}", recipe.modules_to_not_convert)
    )
    return Treatment(weights, activations, linears)


def sections_at(recipe: Recipe, layer_name: str, entry: LinearInput) -> tuple[Weights, Activations]:
    """The sections that hold for an input of the layer at module path ``layer_name``, as they are written."""
    weights, activations = recipe.weights, recipe.activations
    for override in recipe.overrides:
        if _fits(f"{layer_name}.{entry.path}", override.match):
            weights, activations = override.weights or weights, override.activations or activations
    return weights, activations


def sections(recipe: Recipe) -> list[tuple[Weights, Activations]]:
    """Every pair of sections that can hold for some input."""
    weights = [recipe.weights, *(o.weights for o in recipe.overrides if o.weights is not None)]
    activations = [
        recipe.activations,
        *(o.activations for o in recipe.overrides if o.activations is not None),
    ]
    return [(w, a) for w in weights for a in activations]


def changes_linears(recipe: Recipe) -> bool:
    """Whether some linears are rotated or quantized; else they and experts stay what they are."""
    return recipe.rotation is not None or any(weights.bits == 4 for weights, _ in sections(recipe))


def head_is_kept(recipe: Recipe, family: ModelFamily) -> bool:
    """Whether the output head stays in full precision."""
    return recipe.head.bits == 16 or is_kept(recipe, family.head)


def is_kept(recipe: Recipe, name: str) -> bool:
    """Whether a pattern of the recipe keeps the module of this path in full precision."""
    return _matches(name, recipe.modules_to_not_convert)


def embedding_is_kept(recipe: Recipe, family: ModelFamily) -> bool:
    """Whether the embedding stays in full precision."""
    return recipe.embedding.bits == 16 or is_kept(recipe, family.embedding)


def head_shares_codes(recipe: Recipe, family: ModelFamily, config: Any) -> bool:
    """Whether the head of a quantized model multiplies by the codes of its embedding.

    Args:
        recipe: what was done.
        family: of the model.
        config: of the quantized model, which says whether they are still tied; see :func:`keeps_tie`.
    """
    return bool(config.tie_word_embeddings) and not embedding_is_kept(recipe, family)


def keeps_tie(recipe: Recipe, family: ModelFamily, *, folds_residual: bool) -> bool:
    """Whether an output head that is tied to the embedding stays so, and has its codes if it is quantized.

    Not where R1 is folded, since the head then takes up the final norm's gain, and not where the recipe
    treats the head by itself.

    Args:
        recipe: what is done.
        family: of the model.
        folds_residual: R1 is folded into the weights.
    """
    if folds_residual:
        return False
    if embedding_is_kept(recipe, family):
        return head_is_kept(recipe, family)
    alike = recipe.head.bits == 16 or recipe.head.bits == recipe.embedding.bits == 8
    return alike and not _matches(family.head, recipe.modules_to_not_convert)


def check_patterns(recipe: Recipe, family: ModelFamily, model: nn.Module) -> None:
    """Refuse patterns that match nothing in a model.

    Raises:
        RecipeError: there is one; the message gives the names there are.
    """
    inputs: list[tuple[str, str]] = []
    linears: list[tuple[str, str]] = []
    for index, layer in enumerate(model.get_submodule(family.layers).children()):
        for entry in family.inputs_in(layer):
            inputs.append((family.layer_name(index), entry.path))
            linears += [(family.layer_name(index), path) for path in entry.linear_paths]
    for field, patterns, paths, others in (
        ("overrides", [override.match for override in recipe.overrides], inputs, []),
        ("modules_to_not_convert", recipe.modules_to_not_convert, linears, [family.embedding, family.head]),
    ):
        names = [*(f"{layer}.{path}" for layer, path in paths), *others]
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                near = [*names, *(f"*.{name.rsplit('.', 1)[-1]}" for name in names)]
                known = [*dict.fromkeys(f"{family.layers}.N.{path}" for _, path in paths), *others]
                raise RecipeError(
                    f"'{pattern}' in the recipe's {field} matches nothing in this model."
                    f"{did_you_mean(pattern, dict.fromkeys(near))} The names are {', '.join(known)}; a '*'"
                    " in a pattern stands for anything."
                )


def check_recipe(recipe: Recipe, family: ModelFamily, model: nn.Module) -> None:
    """Refuse what a recipe cannot do to a model.

    Raises:
        RecipeError: a pattern matches nothing, a linear or an embedding to quantize has an odd number of
            channels, or R1 would be folded while other modules write to the residual stream.
    """
    check_patterns(recipe, family, model)
    _check_channels(recipe, family, model)
    others = family.other_modules(model)
    if others and family.folds_residual and recipe.rotation is not None and recipe.rotation.residual:
        raise RecipeError(
            f"'{others[0]}' may write to the residual stream, and is not rotated with it."
            " Use --set rotation.residual=false."
        )


def _check_channels(recipe: Recipe, family: ModelFamily, model: nn.Module) -> None:
    for index, layer in enumerate(model.get_submodule(family.layers).children()):
        name = family.layer_name(index)
        for entry in family.inputs_in(layer):
            channels, _ = entry.shape(layer)
            if channels % 2 and treatment(recipe, name, entry).linears:
                raise RecipeError(
                    f"'{name}.{entry.path}' has {channels} channels, and 4-bit codes are stored in pairs."
                    f" Name its linears ({', '.join(entry.linears)}) in the recipe's modules_to_not_convert"
                    " to keep them in 16 bits."
                )
    embedding: Any = model.get_submodule(family.embedding)
    hidden = embedding.embedding_dim
    if hidden % 2 and recipe.embedding.bits == 4 and not embedding_is_kept(recipe, family):
        raise RecipeError(
            f"The embedding '{family.embedding}' has {hidden} channels, and 4-bit codes are stored in pairs."
            " Use --set embedding.bits=8."
        )


def input_scheme(activations: Activations, entry: LinearInput, channels: int) -> InputScheme:
    """How one linear input of this many channels becomes integers."""
    smoothing = activations.smoothing
    if smoothing is None or entry.name not in smoothing.inputs:
        return InputScheme(channels, activations.bits, activations.clip, signed=activations.signed)
    return InputScheme(
        channels,
        activations.bits,
        activations.clip,
        group_size=smoothing.group_size,
        scope=smoothing.scope,
        statistic=smoothing.statistic,
        scales=smoothing.scales,
        channel_order=smoothing.channel_order,
        signed=activations.signed,
    )


def group_size_for(group_size: int | None, channels: int) -> int | None:
    """A recipe's group size, reduced to a divisor of the channels; None stays None (no groups)."""
    return None if group_size is None else math.gcd(group_size, channels)


def _fits(name: str, pattern: str) -> bool:
    """:func:`fnmatchcase`, which compiles patterns: of plain names a recipe may have hundreds."""
    if any(special in pattern for special in "*?["):
        return fnmatchcase(name, pattern)
    return name == pattern


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
