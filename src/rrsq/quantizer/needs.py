"""What a recipe needs to measure on calibration text."""

from __future__ import annotations

from ..recipe import Recipe
from ..runtime.scheme import sections

__all__ = ["needs_calibration", "needs_head_hessian", "needs_hessian", "needs_order"]


def needs_calibration(recipe: Recipe) -> bool:
    """Whether the recipe needs calibration text: GPTQ, a stored channel order or means for the cache do."""
    cache = recipe.kv_cache
    means = cache is not None and (
        any(tensor.offset != "none" or tensor.balance for tensor in (cache.keys, cache.values))
        or cache.sensitive_layers > 0
    )
    return needs_hessian(recipe) or needs_order(recipe) or means or needs_head_hessian(recipe)


def needs_head_hessian(recipe: Recipe) -> bool:
    """Whether the output head is rounded by GPTQ, unless it is kept."""
    return recipe.head.bits == 4 and recipe.weights.method == "gptq"


def needs_hessian(recipe: Recipe) -> bool:
    """Whether some linears are rounded by GPTQ."""
    return any(weights.bits == 4 and weights.method == "gptq" for weights, _ in sections(recipe))


def needs_order(recipe: Recipe) -> bool:
    """Whether some inputs have a stored channel order."""
    return any(
        activations.smoothing is not None and activations.smoothing.channel_order == "calibrated"
        for _, activations in sections(recipe)
    )
