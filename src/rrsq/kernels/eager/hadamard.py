"""Online Hadamard rotation of a linear's input, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["hadamard_transform", "sylvester"]

_DENSE_STEP = 256


def sylvester(order: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Sylvester's Hadamard matrix ``[order, order]`` of ±1; ``order`` is a power of two."""
    H = torch.ones(1, 1, dtype=dtype, device=device)
    while H.shape[0] < order:
        H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)), 0)
    return H


def hadamard_transform(x: Tensor, base: Tensor, block: int) -> Tensor:
    """Multiply each block of channels by the orthonormal Hadamard matrix ``base ⊗ sylvester / sqrt(block)``.

    Row convention: the result is ``x @ R`` with ``R = kron(base, sylvester(block / k)) / sqrt(block)``, the
    same ``R`` whose transpose is folded into the weight (QuaRot, arXiv 2404.00456, section 4).

    Args:
        x: ``[..., channels]`` floating point; ``channels`` is a multiple of ``block``.
        base: ``[k, k]`` of ±1 with ``k`` dividing ``block`` and ``block / k`` a power of two.
        block: channels that are mixed; equal to ``channels`` for a full rotation.

    Returns:
        A tensor like ``x``, in float32 if ``x`` is of lower precision.
    """
    k = base.shape[0]
    power = block // k
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    shape = y.shape
    y = y.reshape(-1, k, power)
    step = min(power, _DENSE_STEP)
    inner = sylvester(step, y.dtype, y.device)
    y = (y.reshape(-1, step) @ inner).reshape(-1, k, power // step, step)
    if power > step:
        outer = sylvester(power // step, y.dtype, y.device)
        y = torch.matmul(outer, y)
    y = y.reshape(-1, k, power)
    if k > 1:
        y = torch.matmul(base.to(y.dtype).t(), y)
    return (y * (1.0 / math.sqrt(block))).reshape(shape)
