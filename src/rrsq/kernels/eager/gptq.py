"""The columns of one block of GPTQ, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packing import CODE_MAX, CODE_MIN

__all__ = ["gptq_block"]


def gptq_block(block: Tensor, steps: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Round the channels of a block one after the other, each one's error fed into those behind it.

    GPTQ (arXiv 2210.17323), algorithm 1, the inner loop.

    Args:
        block: float32 ``[channels, out]``, the weights of the block, a channel a row; it is overwritten.
        steps: float32 ``[channels, out]``, the grid's steps.
        upper: float32 ``[channels, channels]``, its block of the inverse Hessian's upper Cholesky factor.

    Returns:
        Codes, float32 ``[channels, out]`` in [-8, 7], and the errors divided by the factor's diagonal,
        float32 ``[channels, out]``, which the channels behind the block are to be corrected by.
    """
    codes, errors = torch.empty_like(block), torch.empty_like(block)
    channels = block.shape[0]
    for i in range(channels):
        code = (block[i] / steps[i]).round_().clamp_(CODE_MIN, CODE_MAX)
        error = torch.addcmul(block[i], code, steps[i], value=-1.0).div_(upper[i, i])
        if i + 1 < channels:
            block[i + 1 :].addr_(upper[i, i + 1 :], error, alpha=-1.0)
        codes[i] = code
        errors[i] = error
    return codes, errors
