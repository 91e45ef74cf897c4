"""Quantizing the weights of the linears that share one input."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ..recipe import Weights
from ..runtime.modules.linear import QuantizedLinear
from ..runtime.scheme import group_size_for
from .cholesky import permuted
from .gptq import factor_hessian, gptq_codes
from .grid import WeightGrid, choose_grid, round_to_grid
from .refine import refine

__all__ = ["QuantizedWeight", "in_order", "output_snr_db", "quantize_weight", "warn_of_fallback"]


_ELEMENTS_AT_ONCE = 2**24


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes and steps of the stacked weights of one input, and what happened on the way.

    Attributes:
        codes: int8 ``[out, in]``.
        scale: float32 ``[out]``.
        multiplier: ``[out, groups]`` or None, see :class:`~rrsq.quantizer.grid.WeightGrid`.
        fell_back: the recipe asked for GPTQ but the weight was rounded to nearest.
        damping: the Hessian damping that was used, 0 for round to nearest.
    """

    codes: Tensor
    scale: Tensor
    multiplier: Tensor | None
    fell_back: bool
    damping: float

    def values(self) -> Tensor:
        """What the codes stand for, float32 ``[out, in]``."""
        return self.codes * WeightGrid(self.scale, self.multiplier).steps(self.codes.shape[1])

    def store(self, linears: list[QuantizedLinear]) -> None:
        """Hand each linear its rows."""
        start = 0
        for linear in linears:
            rows = slice(start, start + linear.out_features)
            multiplier = None if self.multiplier is None else self.multiplier[rows]
            linear.set_weight(self.codes[rows], self.scale[rows], multiplier)
            start += linear.out_features


def in_order(weight: Tensor, hessian: Tensor | None, order: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A weight ``[out, in]`` and its input's Hessian in a stored order of the channels, if there is one."""
    if order is None:
        return weight, hessian
    return weight[:, order], None if hessian is None else permuted(hessian, order)


def quantize_weight(weight: Tensor, recipe: Weights, hessian: Tensor | None) -> QuantizedWeight:
    """Quantize the stacked weights of the linears that share an input.

    Args:
        weight: float32 ``[out, in]``, rotated, columns in the stored channel order.
        recipe: method, groups, search and damping.
        hessian: float32 ``[in, in]`` of the input, same column order; None for round to nearest.
    """
    with torch.inference_mode():
        group_size = group_size_for(recipe.group_size, weight.shape[1])
        grid = choose_grid(weight, group_size, search=recipe.clip_search, signed=recipe.signed)
        if recipe.method == "rtn" or hessian is None:
            codes = round_to_grid(weight, grid.steps(weight.shape[1]))
            return QuantizedWeight(codes, grid.scale, grid.multiplier, recipe.method != "rtn", 0.0)
        factor = factor_hessian(hessian, act_order=recipe.act_order, damping=recipe.damping)
        result = gptq_codes(weight, grid, factor)
        if factor is None or not result.used_gptq:
            return QuantizedWeight(result.codes, grid.scale, grid.multiplier, True, 0.0)
        damping = factor.damping
        del factor
        codes, grid = refine(weight, result.codes, grid, hessian, damping=damping, passes=recipe.refinement)
        return QuantizedWeight(codes, grid.scale, grid.multiplier, False, damping)


def output_snr_db(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float | None:
    """Signal over error of ``W x`` for inputs of which only ``H = Σ x xᵀ`` is known.

    ``10 log10(tr(W H Wᵀ) / tr(ΔW H ΔWᵀ))``, which is ``Σ‖W x‖² / Σ‖ΔW x‖²`` over the calibration tokens.

    Args:
        weight, rounded: float32 ``[out, in]``; their difference is ``ΔW``.
        hessian: float32 ``[in, in]``.

    Returns:
        dB, or None if it is not finite.
    """

    def energy(matrix: Tensor) -> Tensor:
        return (matrix @ hessian).mul_(matrix).sum(dtype=torch.float64)

    rows = max(1, _ELEMENTS_AT_ONCE // weight.shape[1])
    with torch.inference_mode():
        signal = torch.zeros((), dtype=torch.float64, device=weight.device)
        error = torch.zeros_like(signal)
        for exact, near in zip(weight.split(rows), rounded.split(rows), strict=True):
            signal += energy(exact)
            error += energy(exact - near)
        ratio = float(10 * torch.log10(signal.clamp_min(1e-30) / error.clamp_min(1e-30)))
    return ratio if math.isfinite(ratio) else None


def warn_of_fallback(what: str) -> None:
    """Tell the user that weights were rounded to nearest although the recipe asks for GPTQ."""
    warnings.warn(
        f"{what}: the Hessian could not be factored (it is zero or not finite, or 1000 times the damping"
        " did not help); its weights were rounded to nearest.",
        stacklevel=3,
    )
