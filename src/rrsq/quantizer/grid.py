"""The INT4 grid of a weight: per-row scales and integer group multipliers, chosen before any rounding.

A weight element in row ``n`` and group ``g`` has the step ``scale[n] * multiplier[n, g]``; fixing the steps
up front lets GPTQ visit the channels in any order without moving a channel out of its group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.packing import CODE_MAX, CODE_MIN, MULTIPLIER_MAX

__all__ = ["WeightGrid", "choose_grid", "round_to_grid"]

_HALF_RANGE = CODE_MAX + 0.5
_ROW_SEARCH = tuple(1.05 - 0.0125 * i for i in range(41))
_GROUP_SEARCH = tuple(1.05 - 0.05 * i for i in range(8))
_TINY = 1e-12
_LEAST_EXPONENT = -126  # Of float32 numbers in full precision.
# Elements of a weight that are searched at once: the search keeps several copies of them.
_SEARCHED_AT_ONCE = 2**24


@dataclass(frozen=True)
class WeightGrid:
    """Steps of a weight ``[out, in]``.

    Attributes:
        scale: float32 ``[out]``.
        multiplier: ``[out, groups]``, uint8 in 1..15 or, signed, int8 in ±1..±15; None for one step a row.
    """

    scale: Tensor
    multiplier: Tensor | None

    def steps(self, in_features: int) -> Tensor:
        """The step of each element and its sign, float32 ``[out, in]`` (an expanded view without groups)."""
        if self.multiplier is None:
            return self.scale.unsqueeze(1).expand(-1, in_features)
        per_group = self.scale.unsqueeze(1) * self.multiplier.float()
        return per_group.repeat_interleave(in_features // self.multiplier.shape[1], 1)

    def steps_of(self, channels: Tensor, in_features: int) -> Tensor:
        """The columns ``channels`` (int64 ``[n]``) of :meth:`steps`, float32 ``[out, n]``."""
        if self.multiplier is None:
            return self.scale.unsqueeze(1).expand(-1, len(channels))
        group = channels // (in_features // self.multiplier.shape[1])
        return self.scale.unsqueeze(1) * self.multiplier[:, group].float()


def choose_grid(
    weight: Tensor, group_size: int | None, *, search: bool = True, signed: bool = False
) -> WeightGrid:
    """Choose the steps of a weight.

    Each row (or group) gets the step of least squared rounding error among shrunken ranges. With groups, the
    row's scale is the largest group step over 15, and each multiplier is the best of 1..15 by the same error
    (progressive group quantization, QServe, arXiv 2405.04532).

    Args:
        weight: float32 ``[out, in]``.
        group_size: divides ``in``; None for one step a row.
        search: False takes the range as it is.
        signed: give each group's multiplier the sign with which its largest magnitude is negative: codes
            reach from -8 to 7. Without groups nothing is signed.
    """
    rows = max(1, _SEARCHED_AT_ONCE // weight.shape[1])
    found = [_grid_of_rows(part, group_size, search, signed) for part in weight.split(rows)]
    multipliers = [grid.multiplier for grid in found if grid.multiplier is not None]
    return WeightGrid(
        torch.cat([grid.scale for grid in found]), torch.cat(multipliers) if multipliers else None
    )


def _grid_of_rows(weight: Tensor, group_size: int | None, search: bool, signed: bool) -> WeightGrid:
    out_features, in_features = weight.shape
    groups = 1 if group_size is None else in_features // group_size
    power = _power_of_rows(weight)
    grouped = (weight / power.unsqueeze(1)).view(out_features, groups, -1)
    sign = torch.where(grouped.amax(2) >= -grouped.amin(2), -1.0, 1.0) if signed else None
    if sign is not None and group_size is not None:
        grouped = grouped * sign.unsqueeze(2)
    factors = _ROW_SEARCH if group_size is None else _GROUP_SEARCH
    step = _search_step(grouped, factors if search else (1.0,))
    if group_size is None:
        return WeightGrid(_scaled(step.squeeze(1), power), None)
    scale = step.amax(1) / MULTIPLIER_MAX
    if search:
        multiplier = _search_multiplier(grouped, scale)
    else:
        multiplier = (step / scale.unsqueeze(1)).ceil().clamp(1, MULTIPLIER_MAX)
    if sign is not None:
        return WeightGrid(_scaled(scale, power), (multiplier * sign).to(torch.int8))
    return WeightGrid(_scaled(scale, power), multiplier.to(torch.uint8))


def _power_of_rows(weight: Tensor) -> Tensor:
    """The power of two next to each row's largest magnitude, float32 ``[out]``; 1 for a row of zeros.

    Errors are compared on rows divided by it: squares of very large or small weights would leave float32, and
    nothing else changes, since the division is exact.
    """
    exponent = torch.frexp(weight.abs().amax(1)).exponent.clamp(_LEAST_EXPONENT, -_LEAST_EXPONENT)
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)


def _scaled(scale: Tensor, power: Tensor) -> Tensor:
    """Scales of the original rows; a scale is never zero."""
    return (scale * power).clamp_min(torch.finfo(torch.float32).tiny)


def round_to_grid(weight: Tensor, steps: Tensor) -> Tensor:
    """Nearest codes, int8 ``[out, in]`` in [-8, 7] (round to nearest, RTN)."""
    return (weight / steps).round().clamp(CODE_MIN, CODE_MAX).to(torch.int8)


def _error(grouped: Tensor, step: Tensor) -> Tensor:
    """Squared rounding error of each group, ``[out, groups]``."""
    step = step.unsqueeze(2)
    residual = (grouped * (1.0 / step)).round_().clamp_(CODE_MIN, CODE_MAX).mul_(step).sub_(grouped).square_()
    return residual.sum(2)


def _search_step(grouped: Tensor, factors: tuple[float, ...]) -> Tensor:
    full = grouped.abs().amax(2).clamp_min(_TINY) / _HALF_RANGE
    best = full * factors[0]
    least = _error(grouped, best)
    for factor in factors[1:]:
        step = full * factor
        error = _error(grouped, step)
        best = torch.where(error < least, step, best)
        least = torch.minimum(error, least)
    return best


def _search_multiplier(grouped: Tensor, scale: Tensor) -> Tensor:
    best = torch.ones(grouped.shape[:2], dtype=grouped.dtype, device=grouped.device)
    least = torch.full_like(best, torch.inf)
    for multiplier in range(1, MULTIPLIER_MAX + 1):
        error = _error(grouped, (scale * multiplier).unsqueeze(1).expand_as(best))
        better = error < least
        best[better] = multiplier
        least = torch.minimum(error, least)
    return best
