"""What is refused before anything is quantized."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import NonFiniteError, RecipeError
from ..recipe import Recipe

__all__ = ["check_finite", "check_rope"]


def check_rope(config: Any, recipe: Recipe) -> None:
    """Refuse key offsets where a position's angles change as the text grows: they could not be put back."""
    if recipe.kv_cache is None or recipe.kv_cache.keys.offset == "none":
        return
    if "dynamic" in _rope_types(config):
        raise RecipeError(
            "RoPE of type 'dynamic' changes the angles of earlier tokens as the text grows, so that an"
            " offset of the keys cannot be put back exactly. Use --set kv_cache.keys.offset=none."
        )


def _rope_types(config: Any) -> set[str]:
    """The RoPE types of a configuration, which may differ by the layers' type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    sets = [parameters] if "rope_type" in parameters else list(parameters.values())
    return {entry["rope_type"] for entry in sets if isinstance(entry, dict) and "rope_type" in entry}


def check_finite(model: nn.Module) -> None:
    """Refuse a model with a weight that is NaN or infinite."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise NonFiniteError(
                f"The weight '{name}' holds NaN or Inf. The model is damaged or overflowed when it was"
                " converted; get it again, or convert it from its original precision."
            )
