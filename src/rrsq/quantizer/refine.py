"""After GPTQ: descent on scales, multipliers and codes of a weight, against the error of its outputs.

GPTQ visits each channel once, on a grid that was chosen before. With ``H = Σ x xᵀ``, damped as GPTQ's, the
error of a row is ``(w - ŵ) H (w - ŵ)ᵀ``, a quadratic function of the row's scale, of each group's multiplier
and of each code; every step here takes the best value of some of them while all others stay:

- the row's scale: ``(q H wᵀ) / (q H qᵀ)`` with ``q`` the codes times their multipliers;
- a group's multiplier, one more or one less, together with the group's codes, which GPTQ within the group
  finds for what would be best without rounding;
- a code: the level next to ``ŵ_k + r_k / H_kk``, where ``r = (w - ŵ) H``.

Rows are independent of each other. A row that ends up no better, by rounding errors, stays as it was.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import gptq_block
from ..kernels.packing import CODE_MAX, CODE_MIN, MULTIPLIER_MAX
from .cholesky import cholesky_, invert_lower_, reverse_
from .grid import WeightGrid

__all__ = ["refine"]

_UNGROUPED_BLOCK = 128
_ELEMENTS_AT_ONCE = 2**24
_NEIGHBOURS = (-1, 1)


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
        New codes and steps; in no row is the error, with the damped Hessian, larger than before.
    """
    added = damping * hessian.diagonal().mean()
    if passes == 0 or not bool(torch.isfinite(added)) or not bool(added > 0):
        return codes, grid
    in_features = weight.shape[1]
    hessian = hessian.clone()
    hessian.diagonal().add_(added)
    groups = 1 if grid.multiplier is None else grid.multiplier.shape[1]
    width = in_features // groups if groups > 1 else min(_UNGROUPED_BLOCK, in_features)
    blocks = [
        _Block.of(hessian, start, min(start + width, in_features)) for start in range(0, in_features, width)
    ]
    rows = max(1, _ELEMENTS_AT_ONCE // in_features)
    found = []
    for first in range(0, weight.shape[0], rows):
        part = slice(first, first + rows)
        multiplier = None if grid.multiplier is None else grid.multiplier[part]
        found.append(
            _refined(weight[part], codes[part], grid.scale[part], multiplier, hessian, blocks, passes)
        )
    multipliers = [multiplier for _, _, multiplier in found if multiplier is not None]
    return (
        torch.cat([each for each, _, _ in found]),
        WeightGrid(
            torch.cat([scale for _, scale, _ in found]), torch.cat(multipliers) if multipliers else None
        ),
    )


@dataclass(frozen=True)
class _Block:
    """Channels that are visited together.

    Attributes:
        channels: where they are.
        own: float32 ``[n, n]``, their part of the Hessian.
        inverse: its inverse.
        upper: the upper Cholesky factor of that.
    """

    channels: slice
    own: Tensor
    inverse: Tensor
    upper: Tensor

    @classmethod
    def of(cls, hessian: Tensor, start: int, stop: int) -> _Block:
        own = hessian[start:stop, start:stop].contiguous()
        upper = own.flip(0, 1).contiguous()
        if not cholesky_(upper):
            raise ValueError("the damped Hessian is not positive definite")
        invert_lower_(upper)
        reverse_(upper)
        return cls(slice(start, stop), own, upper.t() @ upper, upper)


def _refined(
    weight: Tensor,
    codes: Tensor,
    scale: Tensor,
    multiplier: Tensor | None,
    hessian: Tensor,
    blocks: list[_Block],
    passes: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`refine` of some rows."""
    before = (codes, scale, multiplier)
    # float32: gradients are sums of products of them.
    q = codes.float()
    u = None if multiplier is None else multiplier.float()
    first = _errors(weight, q, scale, u, hessian)
    for _ in range(passes):
        scale = _best_scale(weight, q, scale, u, hessian)
        gradient = _values(q, scale, u).neg_().add_(weight) @ hessian
        for index, block in enumerate(blocks):
            old = q[:, block.channels]
            factor = None if u is None else u[:, index]
            step = scale if factor is None else scale * factor
            new, moved = _best_codes(old, step, gradient[:, block.channels], block)
            if u is not None and factor is not None:
                u[:, index], new, moved = _best_multiplier(
                    old, scale, factor, new, moved, gradient[:, block.channels], block
                )
            q[:, block.channels] = new
            gradient.addmm_(moved, hessian[block.channels], alpha=-1.0)
    scale = _best_scale(weight, q, scale, u, hessian)
    better = _errors(weight, q, scale, u, hessian) < first
    return (
        torch.where(better.unsqueeze(1), q.to(codes.dtype), before[0]),
        torch.where(better, scale, before[1]),
        None
        if u is None or before[2] is None
        else torch.where(better.unsqueeze(1), u.to(before[2].dtype), before[2]),
    )


def _errors(weight: Tensor, q: Tensor, scale: Tensor, u: Tensor | None, hessian: Tensor) -> Tensor:
    """The error of each row, float64 ``[rows]``."""
    error = _values(q, scale, u).neg_().add_(weight)
    return ((error @ hessian) * error).sum(1, dtype=torch.float64)


def _values(q: Tensor, scale: Tensor, u: Tensor | None) -> Tensor:
    """What codes ``[rows, in]`` stand for."""
    return _multiplied(q, u).mul_(scale.unsqueeze(1))


def _multiplied(q: Tensor, u: Tensor | None) -> Tensor:
    if u is None:
        return q.clone()
    return (q.unflatten(1, (u.shape[1], -1)) * u.unsqueeze(2)).flatten(1)


def _best_scale(weight: Tensor, q: Tensor, scale: Tensor, u: Tensor | None, hessian: Tensor) -> Tensor:
    """The scale of least error of each row; a row where that is not positive keeps its own."""
    q = _multiplied(q, u)
    product = q @ hessian
    best = (product * weight).sum(1) / (product * q).sum(1)
    return torch.where(torch.isfinite(best) & (best > 0), best, scale)


def _best_codes(q: Tensor, step: Tensor, gradient: Tensor, block: _Block) -> tuple[Tensor, Tensor]:
    """One visit of each code of a block.

    Args:
        q: the codes, float32 ``[rows, n]``.
        step: float32 ``[rows]``.
        gradient: float32 ``[rows, n]``, ``(w - ŵ) H`` there.

    Returns:
        New codes, and how much their values have moved, float32 ``[rows, n]``.
    """
    # Channels are rows, so that each step reads contiguous memory.
    r, old = gradient.t().contiguous(), q.t().contiguous()
    new = torch.empty_like(old)
    diagonal = block.own.diagonal()
    for k in range(len(old)):
        new[k] = (old[k] + r[k] / (step * diagonal[k])).round_().clamp_(CODE_MIN, CODE_MAX)
        r[k + 1 :].addr_(block.own[k, k + 1 :], (new[k] - old[k]) * step, alpha=-1.0)
    return new.t(), ((new - old) * step).t()


def _best_multiplier(
    q: Tensor, scale: Tensor, u: Tensor, new: Tensor, moved: Tensor, gradient: Tensor, block: _Block
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a group's multiplier and its neighbours, each with codes of its own, those of least error.

    Args:
        q: the codes as they were, float32 ``[rows, n]``.
        scale, u: float32 ``[rows]``.
        new, moved: :func:`_best_codes`' with the multiplier as it is.
        gradient, block: of the group.

    Returns:
        The multiplier, codes, and how much values have moved.
    """
    old = q * (scale * u).unsqueeze(1)
    target = (old + gradient @ block.inverse).t().contiguous()
    least = _change(moved, gradient, block)
    best = u
    for change in _NEIGHBOURS:
        # A multiplier keeps its sign: it is one more or one less in magnitude.
        tried = (u.abs() + change).clamp(1, MULTIPLIER_MAX).copysign(u)
        step = scale * tried
        tried_codes, _ = gptq_block(target, step.expand_as(target).contiguous(), block.upper)
        tried_codes = tried_codes.t()
        tried_moved = tried_codes * step.unsqueeze(1) - old
        error = _change(tried_moved, gradient, block)
        better = error < least
        best = torch.where(better, tried, best)
        new = torch.where(better.unsqueeze(1), tried_codes, new)
        moved = torch.where(better.unsqueeze(1), tried_moved, moved)
        least = torch.minimum(least, error)
    return best, new, moved


def _change(moved: Tensor, gradient: Tensor, block: _Block) -> Tensor:
    """By how much the error changes when values of a block move, float32 ``[rows]``."""
    return (moved * (moved @ block.own - 2 * gradient)).sum(1)
