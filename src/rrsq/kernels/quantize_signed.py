"""Rotation of neighbouring channels and quantization to sixteen signed levels, in one pass.

Each block of channels is rotated by an orthonormal Hadamard matrix, in registers. Then each group has an
integer multiplier with a sign: the level without a counterpart, -8, goes to the side of the group's largest
magnitude. Among a few multipliers the one of least squared error is taken; the token's largest magnitude is
never clipped by the largest of them.

All of it is defined to the bit, so that every implementation gives the same codes. A block is taken to
float16 relative to its largest magnitude, by a power of two, before it is rotated: the sums are then exact in
any order (:mod:`.rotation`). Squared errors are summed as integers.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import math

import torch
from torch import Tensor

from ._triton import ceil_div, next_power_of_two, tl, triton
from .codes import code_max, code_scale, largest_magnitude, round_to_code, scale_of
from .operation import Constraints, operation
from .rotation import half_range, sylvester, to_half_range

__all__ = ["SIGNED_MAX", "quantize_signed", "rotate_blocks"]

SIGNED_MAX = 15
"""Largest multiplier of a group: its largest code, -8, times it fits into int8."""
_CANDIDATES = 4
_FRACTION = 256.0
"""Errors are counted in this part of the scale ``a``."""


def _fake(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


def _sizes(x: Tensor, bits: int, group_size: int | None, block: int) -> tuple[tuple[str, int], ...]:
    sizes = ("channels", x.shape[1]), ("hadamard_block", block)
    return sizes if group_size is None else (*sizes, ("group_size", group_size))


def rotate_blocks(x: Tensor, block: int) -> Tensor:
    """``x @ R``, ``R`` block-diagonal with the orthonormal Sylvester matrix of order ``block``.

    Args:
        x: floating point ``[tokens, channels]``; ``block``, a power of two up to 256, divides ``channels``.
        block: channels that are mixed.

    Returns:
        float32 ``[tokens, channels]``, to the bit what every implementation computes.
    """
    if block == 1:
        return x.float()
    blocks = x.float().unflatten(1, (-1, block))
    down, up = half_range(blocks.abs().amax(2, keepdim=True))
    y = torch.matmul((blocks * down).half().float(), sylvester(block, torch.float32, x.device))
    return (y * (up * (1.0 / math.sqrt(block)))).flatten(1)


@operation(
    fake=_fake,
    sizes=_sizes,
    dtypes=("x",),
    typical={"x": torch.bfloat16, "channels": 4096, "hadamard_block": 16, "group_size": 16},
)
def quantize_signed(x: Tensor, bits: int, group_size: int | None, block: int) -> tuple[Tensor, Tensor]:
    """Rotate blocks of channels and quantize each token.

    With ``y`` the rotated token, ``A`` its largest magnitude and ``M_g`` a group's: ``a = A / 105``;
    ``s = -1`` where the group's largest magnitude is positive, else 1; ``m_0 = ceil(M_g / (7 a))``, in 1..15.
    Of ``m_0``, ``m_0 - 1``, ``m_0 - 2`` and ``m_0 - 3``, those from 1 on, ``m`` is the one of least squared
    error, the largest among equals, with ``code = round(s y / (a m))`` in -8..7. The operand is ``s m code``,
    in ±120. Without groups: ``a = A / c``, ``code = round(y / a)`` in ±c, ``c = code_max(bits)``.

    Args:
        x: floating point ``[tokens, channels]``.
        bits: 4 or 8; groups need 4.
        group_size: channels a multiplier covers; divides ``channels``. None: one scale a token.
        block: channels that are mixed by the rotation, see :func:`rotate_blocks`; 1 for none.

    Returns:
        ``operand`` int8 ``[tokens, channels]`` and ``scale`` float32 ``[tokens]`` (``a``), with
        ``y ≈ operand * scale``. The scale of a token that holds NaN or an infinite value is NaN, and its
        operand anything.
    """
    y = rotate_blocks(x, block)
    if group_size is None:
        c = code_max(bits)
        scale = code_scale(_largest(x, y), 1.0 / c)
        return (y * (1.0 / scale).unsqueeze(1)).round_().clamp_(-c, c).to(torch.int8), scale
    scale = code_scale(_largest(x, y), 1.0 / (7 * SIGNED_MAX))
    r = (y * (1.0 / scale).unsqueeze(1)).unflatten(1, (-1, group_size))
    top, bottom = r.amax(2, keepdim=True), -r.amin(2, keepdim=True)
    sign = torch.where(top >= bottom, -1.0, 1.0)
    r = r * sign
    first = (torch.maximum(top, bottom) * (1.0 / 7)).ceil().clamp(1, SIGNED_MAX)
    best, least = torch.zeros_like(r), torch.full_like(top, torch.inf)
    for step in range(_CANDIDATES):
        m = (first - step).clamp_min(1)
        value = (r * (1.0 / m)).round().clamp(-8, 7) * m
        error = ((r - value) * _FRACTION).round().square().sum(2, keepdim=True, dtype=torch.float64)
        better = error < least
        best, least = torch.where(better, value, best), torch.where(better, error.float(), least)
    return (best * sign).flatten(1).to(torch.int8), scale


def _largest(x: Tensor, y: Tensor) -> Tensor:
    """Each rotated token's largest magnitude; NaN where the token holds NaN or an infinite value."""
    largest = y.abs().amax(1)
    return torch.where(x.abs().amax(1).float() < torch.inf, largest, torch.nan)


_TOP = tl.constexpr(15.0)
_PART = tl.constexpr(256.0)
_COUNT = tl.constexpr(4)
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def _round(value):
    """Round to nearest, ties to even, |value| < 2^22."""
    return (value + _ROUNDER) - _ROUNDER


@triton.jit
def _signed_codes(y, inverse):
    """``s m code`` of groups ``[groups, group size]``, float32; ``inverse`` is 1 / a."""
    r = y * inverse
    top = tl.max(r, 1)
    bottom = -tl.min(r, 1)
    sign = tl.where(top >= bottom, -1.0, 1.0)
    r = r * sign[:, None]
    first = tl.ceil(tl.maximum(top, bottom) * 0.14285714285714285)
    first = tl.minimum(tl.maximum(first, 1.0), _TOP)
    best = tl.zeros(r.shape, tl.float32)
    least = tl.full(first.shape, 0x7FFFFFFF, tl.int32)
    for step in tl.static_range(_COUNT):
        m = tl.maximum(first - step, 1.0)
        scaled = r * tl.div_rn(tl.full(m.shape, 1.0, tl.float32), m)[:, None]
        value = tl.minimum(tl.maximum(_round(scaled), -8.0), 7.0) * m[:, None]
        part = _round((r - value) * _PART).to(tl.int32)
        error = tl.sum(part * part, 1)
        better = error < least
        best = tl.where(better[:, None], value, best)
        least = tl.where(better, error, least)
    return best * sign[:, None]


@triton.jit
def _quantize_kernel(
    x_pointer,
    fast_pointer,
    operand_pointer,
    scale_pointer,
    channels,
    scale_factor,
    normalization,
    CODE_MAX: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One token, seen as ``[BLOCKS, BLOCK]`` with zeros past the last; ``GROUP`` 0: no multipliers.

    ``fast_pointer`` float16 ``[BLOCK, BLOCK]``: Sylvester's matrix. ``scale_factor``: what the token's
    largest magnitude is multiplied by. ``normalization``: 1 / sqrt(BLOCK).
    """
    token = tl.program_id(0)
    start = token.to(tl.int64) * channels
    row = tl.arange(0, BLOCKS)
    column = tl.arange(0, BLOCK)
    offset = row[:, None] * BLOCK + column[None, :]
    inside = offset < channels
    x = tl.load(x_pointer + start + offset, mask=inside, other=0.0).to(tl.float32)
    largest_x = tl.max(largest_magnitude(x, 1).to(tl.int32, bitcast=True), 0).to(tl.float32, bitcast=True)
    fast = tl.load(fast_pointer + column[:, None] * BLOCK + column[None, :])
    down, up = to_half_range(tl.max(tl.abs(x), 1))
    y = tl.dot((x * down[:, None]).to(tl.float16), fast)
    y = y * (up * normalization)[:, None]
    largest = tl.max(tl.max(tl.abs(y), 1), 0)
    scale = scale_of(tl.where(largest_x < float("inf"), largest, float("nan")), scale_factor)
    tl.store(scale_pointer + token, scale)
    inverse = tl.div_rn(1.0, scale)
    if GROUP > 0:
        grouped = y.reshape(BLOCKS * BLOCK // GROUP, GROUP)
        operand = _signed_codes(grouped, inverse).reshape(BLOCKS, BLOCK).to(tl.int32)
    else:
        operand = round_to_code(y * inverse, CODE_MAX)
    tl.store(operand_pointer + start + offset, operand.to(tl.int8), mask=inside)


@quantize_signed.kernel(
    "triton",
    Constraints.on_gpu(
        dtypes={"x": frozenset({torch.float16, torch.bfloat16, torch.float32})},
        at_least={"hadamard_block": 16, "group_size": 2},
        at_most={"hadamard_block": 64, "group_size": 1024, "channels": 65536},
        power_of_two=frozenset({"hadamard_block", "group_size"}),
    ),
)
def _launch(x: Tensor, bits: int, group_size: int | None, block: int) -> tuple[Tensor, Tensor]:
    tokens, channels = x.shape
    x = x.contiguous()
    operand = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=x.device)
    if tokens == 0:
        return operand, scale
    blocks = max(next_power_of_two(ceil_div(channels, block)), 16)
    limit = code_max(bits)
    _quantize_kernel[(tokens,)](
        x,
        _fast(block, x.device),
        operand,
        scale,
        channels,
        1.0 / (limit if group_size is None else 7 * SIGNED_MAX),
        1.0 / math.sqrt(block),
        CODE_MAX=limit,
        GROUP=group_size or 0,
        BLOCK=block,
        BLOCKS=blocks,
        enable_fp_fusion=False,
        num_warps=min(max(blocks * block // 1024, 1), 16),
    )
    return operand, scale


_matrices: dict[tuple[int, torch.device], Tensor] = {}


def _fast(block: int, device: torch.device) -> Tensor:
    """Sylvester's matrix in float16 on a device, made once."""
    key = (block, device)
    if key not in _matrices:
        made = sylvester(block, torch.float16, device)
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return made  # Its memory would be the graph's.
            torch.cuda.current_stream(device).synchronize()
        _matrices[key] = made
    return _matrices[key]
