"""After GPTQ: descent on scales and codes of a weight, against the error of its outputs.

GPTQ visits each channel once, on a grid that was chosen before. With ``H = Σ x xᵀ``, damped as GPTQ's, the
error of a row is ``(w - ŵ) H (w - ŵ)ᵀ``, a quadratic function of the row's scale and of each code; every step
here takes the best value of one of them while all others stay:

- the row's scale: ``(q H wᵀ) / (q H qᵀ)`` with ``q`` the codes times their multipliers;
- a code: the level next to ``ŵ_k + r_k / H_kk``, where ``r = (w - ŵ) H``.

Rows are independent of each other. A row that ends up no better, by rounding errors, stays as it was.
Multipliers stay: a step on them with all codes of a group gained less than another pass over the codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.packing import CODE_MAX, CODE_MIN
from .grid import WeightGrid

__all__ = ["refine"]

_BLOCK = 128
_ELEMENTS_AT_ONCE = 2**24


def refine(
    weight: Tensor, codes: Tensor, grid: WeightGrid, hessian: Tensor, *, damping: float, passes: int
) -> tuple[Tensor, WeightGrid]:
    """Lower the error ``Σ‖W x - Ŵ x‖²`` of a quantized weight.

    Args:
        weight: float32 ``[out, in]``.
        codes: int8 ``[out, in]`` in [-8, 7].
        grid: their steps.
        hessian: float32 ``[in, in]``, ``Σ x xᵀ``.
        damping: fraction of its mean diagonal that is added to it.
        passes: how often everything is visited.

    Returns:
        New codes, and the grid with new scales; in no row is the error, with the damped Hessian, larger than
        before.
    """
    added = damping * hessian.diagonal().mean()
    if passes == 0 or not bool(torch.isfinite(added)) or not bool(added > 0):
        return codes, grid
    hessian = hessian.clone()
    hessian.diagonal().add_(added)
    rows = max(1, _ELEMENTS_AT_ONCE // weight.shape[1])
    found, scales = [], []
    for first in range(0, weight.shape[0], rows):
        part = slice(first, first + rows)
        multiplier = None if grid.multiplier is None else grid.multiplier[part]
        new, scale = _refined(
            weight[part], codes[part], WeightGrid(grid.scale[part], multiplier), hessian, passes
        )
        found.append(new)
        scales.append(scale)
    return torch.cat(found), WeightGrid(torch.cat(scales), grid.multiplier)


def _refined(
    weight: Tensor, codes: Tensor, grid: WeightGrid, hessian: Tensor, passes: int
) -> tuple[Tensor, Tensor]:
    """:func:`refine` of some rows: codes and scales."""
    in_features = weight.shape[1]
    # Of a scale of one: what the codes are multiplied by.
    factors = WeightGrid(torch.ones_like(grid.scale), grid.multiplier).steps(in_features)
    q, scale = codes.float(), grid.scale
    before = _errors(weight, q * factors, scale, hessian)
    for _ in range(passes):
        scale = _best_scale(weight, q * factors, scale, hessian)
        gradient = _residual(weight, q * factors, scale) @ hessian
        for start in range(0, in_features, _BLOCK):
            channels = slice(start, min(start + _BLOCK, in_features))
            step = factors[:, channels] * scale.unsqueeze(1)
            moved = _visit(q[:, channels], step, gradient[:, channels], hessian[channels, channels])
            gradient.addmm_(moved, hessian[channels], alpha=-1.0)
    scale = _best_scale(weight, q * factors, scale, hessian)
    better = _errors(weight, q * factors, scale, hessian) < before
    return torch.where(better.unsqueeze(1), q.to(codes.dtype), codes), torch.where(better, scale, grid.scale)


def _residual(weight: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """``w - ŵ``; ``q`` is overwritten."""
    return q.mul_(scale.unsqueeze(1)).neg_().add_(weight)


def _errors(weight: Tensor, q: Tensor, scale: Tensor, hessian: Tensor) -> Tensor:
    """The error of each row, float64 ``[rows]``; ``q`` is overwritten."""
    residual = _residual(weight, q, scale)
    return (residual @ hessian).mul_(residual).sum(1, dtype=torch.float64)


def _best_scale(weight: Tensor, q: Tensor, scale: Tensor, hessian: Tensor) -> Tensor:
    """The scale of least error of each row; a row where that is not positive keeps its own."""
    product = q @ hessian
    best = (product * weight).sum(1) / (product * q).sum(1)
    return torch.where(torch.isfinite(best) & (best > 0), best, scale)


def _visit(codes: Tensor, step: Tensor, gradient: Tensor, hessian: Tensor) -> Tensor:
    """One visit of each code of a block of channels.

    Args:
        codes: float32 ``[rows, n]``; overwritten by the new ones.
        step: float32 ``[rows, n]``.
        gradient: float32 ``[rows, n]``, ``(w - ŵ) H`` there.
        hessian: float32 ``[n, n]``, that of the block.

    Returns:
        How much their values have moved, float32 ``[rows, n]``.
    """
    # Channels are rows, so that each step reads contiguous memory.
    r, old, steps = gradient.t().contiguous(), codes.t().contiguous(), step.t().contiguous()
    wanted = (steps * hessian.diagonal().unsqueeze(1)).reciprocal_()
    moved = torch.empty_like(old)
    for k in range(len(old)):
        new = torch.addcmul(old[k], r[k], wanted[k]).round_().clamp_(CODE_MIN, CODE_MAX)
        torch.mul(new - old[k], steps[k], out=moved[k])
        old[k] = new
        r[k + 1 :].addr_(hessian[k, k + 1 :], moved[k], alpha=-1.0)
    codes.copy_(old.t())
    return moved.t()
