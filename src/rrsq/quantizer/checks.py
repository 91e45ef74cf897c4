"""What is refused: before anything is quantized, and where numbers leave their range on the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError, NonFiniteError, RecipeError
from ..recipe import Recipe, Rotation
from .calibration.stored import StoredCalibration
from .needs import needs_head_hessian, needs_hessian, needs_order

__all__ = [
    "check_activations",
    "check_finite",
    "check_finite_weight",
    "check_result",
    "check_rope",
    "check_stored",
    "is_finite",
]


def check_stored(stored: StoredCalibration, recipe: Recipe, seed: int) -> None:
    """Refuse a calibration folder that lacks what a recipe with this seed of its rotations needs.

    Raises:
        CalibrationError: with what is missing and how to get it.
    """
    manifest, cache = stored.manifest, recipe.kv_cache
    if (needs_hessian(recipe) or needs_head_hessian(recipe)) and not manifest.hessians:
        raise CalibrationError(
            f"'{stored.folder}' holds no Hessians (it was made with --no-hessians), which GPTQ needs. Run"
            " rrsq calibrate without that option, or take --set weights.method=rtn."
        )
    if cache is not None and cache.sensitive_layers > 0:
        raise CalibrationError(
            "kv_cache.sensitive_layers is found by running text through the quantized cache, which a"
            " calibration folder cannot replace. Leave out --calibration."
        )
    if needs_order(recipe) and not stored.holds_magnitudes(recipe.rotation, seed):
        raise CalibrationError(
            f"The recipe '{recipe.name}' stores an order of the channels by magnitude, and '{stored.folder}'"
            f" holds the magnitudes for {_describe(manifest.recipe.rotation, manifest.seed)}, not for"
            f" {_describe(recipe.rotation, seed)}. Run rrsq calibrate with --recipe {recipe.name}"
            f" --seed {seed}."
        )


def _describe(rotation: Rotation | None, seed: int) -> str:
    if rotation is None:
        return "no rotation"
    chosen = ", ".join(f"{key}={value}" for key, value in rotation.model_dump().items())
    return f"a rotation with seed {seed} and {chosen}"


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
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    sets = [parameters] if "rope_type" in parameters else list(parameters.values())
    return {entry["rope_type"] for entry in sets if isinstance(entry, dict) and "rope_type" in entry}


def check_finite(model: nn.Module) -> None:
    """Refuse a model with a weight that is NaN or infinite."""
    for name, parameter in model.named_parameters():
        check_finite_weight(parameter, name)


def check_finite_weight(weight: Tensor, name: str) -> None:
    """Refuse a weight of the original model that is NaN or infinite."""
    if not is_finite(weight):
        raise NonFiniteError(
            f"The weight '{name}' holds NaN or Inf. The model is damaged or overflowed when it was converted;"
            " get it again, or convert it from its original precision."
        )


def check_activations(tensor: Tensor, where: str) -> None:
    """Refuse activations (or their magnitudes) that are NaN or infinite: nothing behind them means anything.

    Raises:
        NonFiniteError: one is; ``where`` names them.
    """
    if not is_finite(tensor):
        raise NonFiniteError(
            f"{where}: NaN or Inf on the calibration text. The model's numbers overflow there: check that the"
            " original model gives sensible text, or choose another --calibration-data."
        )


def check_result(module: nn.Module, name: str) -> None:
    """Refuse a quantized module with a number that is NaN or infinite, such as one its dtype has no room for.

    Raises:
        NonFiniteError: there is one; ``name`` is the module's path.
    """
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise NonFiniteError(
                f"Quantizing made '{name}.{key}' NaN or Inf in {tensor.dtype}. The model's norm gains and"
                " weights multiply to more than that dtype holds; convert it to float32 or bfloat16 first."
            )


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf; without a second tensor of its size."""
    least, most = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(least) & torch.isfinite(most))
