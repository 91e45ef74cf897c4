"""GPTQ (arXiv 2210.17323): rounding with error feedback through the Hessian of a layer's inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.eager.packing import CODE_MAX, CODE_MIN
from .grid import round_to_grid

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
    H = hessian.clone()
    H.diagonal()[dead] = 1.0
    if act_order:
        order = H.diagonal().masked_fill(dead, -1.0).argsort(descending=True, stable=True)
    else:
        order = torch.arange(H.shape[0], device=H.device)
    H = H[order][:, order]
    mean = H.diagonal().mean()
    for attempt in range(_DAMPING_TRIES):
        fraction = damping * 10**attempt
        damped = H.clone()
        damped.diagonal().add_(fraction * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) != 0:
            continue
        upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if int(info) == 0 and bool(torch.isfinite(upper).all()):
            return HessianFactor(order, upper, dead, fraction)
    return None


def gptq_codes(weight: Tensor, steps: Tensor, factor: HessianFactor | None) -> GPTQResult:
    """Round a weight on given steps, feeding each channel's error into the channels not yet rounded.

    Lazy batched updates (section 3.3): within blocks of 128 channels the feedback is applied at once, to the
    rest of the matrix once a block.

    Args:
        weight: float32 ``[out, in]``.
        steps: float32 ``[out, in]``, the grid's step of each element.
        factor: from :func:`factor_hessian`; None rounds to nearest.
    """
    if factor is None:
        return GPTQResult(round_to_grid(weight, steps), used_gptq=False)
    W = weight.masked_fill(factor.dead, 0.0)[:, factor.order]
    S = steps[:, factor.order]
    codes = torch.empty_like(W)
    in_features = W.shape[1]
    for start in range(0, in_features, _BLOCK):
        stop = min(start + _BLOCK, in_features)
        # Channels are rows here, so that each step of the loop reads contiguous memory.
        block = W[:, start:stop].t().contiguous()
        block_steps = S[:, start:stop].t().contiguous()
        block_codes = torch.empty_like(block)
        errors = torch.empty_like(block)
        U = factor.upper[start:stop, start:stop]
        for i in range(stop - start):
            code = (block[i] / block_steps[i]).round_().clamp_(CODE_MIN, CODE_MAX)
            error = torch.addcmul(block[i], code, block_steps[i], value=-1.0).div_(U[i, i])
            if i + 1 < stop - start:
                block[i + 1 :].addr_(U[i, i + 1 :], error, alpha=-1.0)
            block_codes[i] = code
            errors[i] = error
        codes[:, start:stop] = block_codes.t()
        if stop < in_features:
            W[:, stop:].addmm_(errors.t(), factor.upper[start:stop, stop:], alpha=-1.0)
    if not bool(torch.isfinite(codes).all()):
        return GPTQResult(round_to_grid(weight, steps), used_gptq=False)
    result = torch.empty_like(codes, dtype=torch.int8)
    result[:, factor.order] = codes.to(torch.int8)
    return GPTQResult(result, used_gptq=True)
