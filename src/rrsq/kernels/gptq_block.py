"""The columns of one block of GPTQ: one program a tile of output rows, its weights in registers."""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import torch
from torch import Tensor

from ._triton import ceil_div, next_power_of_two, tl, triton
from .operation import Constraints, operation
from .packing import CODE_MAX, CODE_MIN

__all__ = ["gptq_block"]

_BLOCK_ROWS = 16


def _fake(block: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(block), torch.empty_like(block)


def _sizes(block: Tensor, *_: object) -> tuple[tuple[str, int], ...]:
    return (("channels", block.shape[0]),)


@operation(fake=_fake, sizes=_sizes, dtypes=("block",), typical={"block": torch.float32, "channels": 128})
def gptq_block(block: Tensor, steps: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Round the channels of a block one after the other, each one's error fed into those behind it.

    GPTQ (arXiv 2210.17323), algorithm 1, the inner loop.

    Args:
        block: float32 ``[channels, out]``, the weights of the block, a channel a row.
        steps: float32 ``[channels, out]``, the grid's steps.
        upper: float32 ``[channels, channels]``, its block of the inverse Hessian's upper Cholesky factor.

    Returns:
        Codes, float32 ``[channels, out]`` in [-8, 7], and the errors divided by the factor's diagonal,
        float32 ``[channels, out]``, which the channels behind the block are to be corrected by.
    """
    block = block.clone()
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


# 1.5 * 2**23: adding it leaves no fraction bits, so that the sum is rounded to the nearest even integer.
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def _gptq_block_kernel(
    block_pointer,
    steps_pointer,
    upper_pointer,
    codes_pointer,
    errors_pointer,
    rows,
    channels,
    upper_stride,
    CHANNELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Codes and errors ``[channels, rows]`` of ``block`` ``[channels, rows]``.

    ``CHANNELS`` is a power of two that is not below ``channels``. The channels behind the one at hand are
    corrected by a rank-1 update of the tile; those before it are multiplied by zeros of the upper factor.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = tl.arange(0, CHANNELS)
    inside = (row < rows)[:, None] & (channel < channels)[None, :]
    offsets = channel[None, :] * rows + row[:, None]
    weights = tl.load(block_pointer + offsets, mask=inside, other=0.0)
    for i in range(0, channels):
        start = i * rows
        value = tl.sum(tl.where((channel == i)[None, :], weights, 0.0), axis=1)
        step = tl.load(steps_pointer + start + row, mask=row < rows, other=1.0)
        code = tl.minimum(tl.maximum(tl.div_rn(value, step), -8.0), 7.0)
        code = (code + _ROUNDER) - _ROUNDER
        diagonal = tl.load(upper_pointer + i * upper_stride + i)
        error = tl.div_rn(value - code * step, diagonal)
        tl.store(codes_pointer + start + row, code, mask=row < rows)
        tl.store(errors_pointer + start + row, error, mask=row < rows)
        behind = tl.load(
            upper_pointer + i * upper_stride + channel, mask=(channel > i) & (channel < channels), other=0.0
        )
        weights -= error[:, None] * behind[None, :]


@gptq_block.kernel(
    "triton",
    # A block's weights stay in registers.
    Constraints.on_gpu(dtypes={"block": frozenset({torch.float32})}, at_most={"channels": 128}),
)
def _launch(block: Tensor, steps: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    channels, rows = block.shape
    codes, errors = torch.empty_like(block), torch.empty_like(block)
    _gptq_block_kernel[(ceil_div(rows, _BLOCK_ROWS),)](
        block.contiguous(),
        steps.contiguous(),
        upper,
        codes,
        errors,
        rows,
        channels,
        upper.stride(0),
        CHANNELS=max(16, next_power_of_two(channels)),
        BLOCK_ROWS=_BLOCK_ROWS,
    )
    return codes, errors
