"""GPTQ (arXiv 2210.17323): rounding with error feedback through the Hessian of a layer's inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import gptq_block
from .checks import is_finite
from .cholesky import cholesky_, invert_lower_, permuted, reverse_
from .grid import WeightGrid, round_to_grid

__all__ = ["GPTQResult", "HessianFactor", "factor_hessian", "gptq_codes"]

_BLOCK = 128
_DAMPING_TRIES = 4


@dataclass(frozen=True)
class HessianFactor:
    """What GPTQ needs of a Hessian; linears that share an input share it.

    Attributes:
        order: int64 ``[in]``, the order in which channels are rounded.
        upper: float32 ``[in, in]``, the upper Cholesky factor of the inverse, in that order.
        dead: bool ``[in]``, channels that were never active, in the original order.
        damping: the fraction of the mean diagonal that had to be added.
    """

    order: Tensor
    upper: Tensor
    dead: Tensor
    damping: float


@dataclass(frozen=True)
class GPTQResult:
    """Codes of a weight, int8 ``[out, in]``, and whether GPTQ made them (else they are the nearest ones)."""

    codes: Tensor
    used_gptq: bool


def factor_hessian(hessian: Tensor, *, act_order: bool, damping: float) -> HessianFactor | None:
    """Factor ``H = Σ x xᵀ`` for GPTQ.

    Damping is raised tenfold up to three times if the Cholesky factorization fails.

    Args:
        hessian: float32 ``[in, in]``, symmetric.
        act_order: round channels by falling diagonal.
        damping: fraction of the mean diagonal to add.

    Returns:
        The factor, or None if the matrix is zero or not finite, or no damping made it positive definite.
    """
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    if not bool(torch.isfinite(diagonal).all()) or bool(dead.all()):
        return None
    filled = diagonal.masked_fill(dead, 1.0)
    if act_order:
        order = filled.masked_fill(dead, -1.0).argsort(descending=True, stable=True)
    else:
        order = torch.arange(len(filled), device=filled.device)
    # With H = R Rᵀ for an upper R, the factor wanted is the inverse of R. R is the lower Cholesky factor of
    # the reversed matrix, itself reversed: one factorization, in the memory of one more matrix.
    last_first = order.flip(0)
    for attempt in range(_DAMPING_TRIES):
        fraction = damping * 10**attempt
        lower = permuted(hessian, last_first)
        lower.diagonal().copy_(filled[last_first] + fraction * filled.mean())
        if not cholesky_(lower):
            continue
        invert_lower_(lower)
        reverse_(lower)
        if is_finite(lower):
            return HessianFactor(order, lower, dead, fraction)
    return None


def gptq_codes(weight: Tensor, grid: WeightGrid, factor: HessianFactor | None) -> GPTQResult:
    """Round a weight to a grid, feeding each channel's error into the channels not yet rounded.

    Lazy batched updates (section 3.3): within blocks of 128 channels the feedback is applied at once, to the
    rest of the matrix once a block.

    Args:
        weight: float32 ``[out, in]``.
        grid: of the weight.
        factor: from :func:`factor_hessian`; None rounds to nearest.
    """
    in_features = weight.shape[1]
    if factor is None:
        return GPTQResult(round_to_grid(weight, grid.steps(in_features)), used_gptq=False)
    W = weight[:, factor.order].masked_fill_(factor.dead[factor.order], 0.0)
    codes = torch.empty(W.shape, dtype=torch.int8, device=W.device)
    finite = torch.ones((), dtype=torch.bool, device=W.device)
    for start in range(0, in_features, _BLOCK):
        stop = min(start + _BLOCK, in_features)
        channels = factor.order[start:stop]
        # Channels are rows in a block, so that each of its steps reads contiguous memory.
        block = W[:, start:stop].t().contiguous()
        block_codes, errors = gptq_block(
            block,
            grid.steps_of(channels, in_features).t().contiguous(),
            factor.upper[start:stop, start:stop],
        )
        finite &= torch.isfinite(errors).all()
        codes[:, channels] = block_codes.t().to(torch.int8)
        if stop < in_features:
            W[:, stop:].addmm_(errors.t(), factor.upper[start:stop, stop:], alpha=-1.0)
    if not bool(finite):
        return GPTQResult(round_to_grid(weight, grid.steps(in_features)), used_gptq=False)
    return GPTQResult(codes, used_gptq=True)
