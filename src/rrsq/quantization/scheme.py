"""From a recipe to the scheme of each linear input."""

from __future__ import annotations

import math

from ..models import LinearInput, ModelSizes
from ..nn.input import InputScheme
from ..recipe import Recipe

__all__ = ["group_size_for", "input_scheme"]


def input_scheme(recipe: Recipe, entry: LinearInput, sizes: ModelSizes) -> InputScheme:
    """How the recipe treats one linear input of a model of these sizes."""
    activations = recipe.activations
    channels = sizes.channels(entry.name)
    smoothing = activations.smoothing
    if smoothing is None or entry.name not in smoothing.inputs:
        return InputScheme(channels, activations.bits, activations.clip)
    return InputScheme(
        channels,
        activations.bits,
        activations.clip,
        group_size=smoothing.group_size,
        scope=smoothing.scope,
        statistic=smoothing.statistic,
        fold=smoothing.fold == "integer",
        channel_order=smoothing.channel_order,
    )


def group_size_for(group_size: int | None, channels: int) -> int | None:
    """A recipe's group size, reduced to a divisor of the channels; None stays None (no groups)."""
    return None if group_size is None else math.gcd(group_size, channels)
