"""Smoothing and quantization of activations without a rotation: one program a token."""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import triton
import triton.language as tl

__all__ = [
    "fold",
    "quantize_folded_kernel",
    "quantize_smoothed_kernel",
    "round_to_code",
    "smoothing_statistic_kernel",
]

_ROUNDER = tl.constexpr(12582912.0)
_ROUNDER_BITS = tl.constexpr(0x4B400000)
_TINY = tl.constexpr(1e-30)
_FOLD_MAX = tl.constexpr(18.0)


@triton.jit
def round_to_code(value, CODE_MAX: tl.constexpr):
    """Round to nearest, ties to even, within ±CODE_MAX, as int32.

    Adding 1.5 * 2^23 leaves the integer in the low bits; a conversion instruction has an eighth of the
    throughput.
    """
    limited = tl.minimum(tl.maximum(value, -CODE_MAX), CODE_MAX)
    return (limited + _ROUNDER).to(tl.int32, bitcast=True) - _ROUNDER_BITS


@triton.jit
def fold(grouped, group_max, scale, code_factor, CODE_MAX: tl.constexpr):
    """``code * m``, int32, of float32 ``[groups, group size]`` for a token's ``scale``; see the reference."""
    multiplier = tl.ceil(tl.div_rn(group_max * code_factor, tl.broadcast_to(scale, group_max.shape)))
    multiplier = tl.minimum(tl.maximum(multiplier, 1.0), _FOLD_MAX)
    inverse = tl.div_rn(tl.full(multiplier.shape, 1.0, tl.float32), scale * multiplier)
    return round_to_code(grouped * inverse[:, None], CODE_MAX) * multiplier.to(tl.int32)[:, None]


@triton.jit
def quantize_folded_kernel(
    x_pointer,
    operand_pointer,
    scale_pointer,
    channels,
    scale_factor,
    code_factor,
    CODE_MAX: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One token, in ``BLOCKS`` pieces of ``BLOCK`` channels; with several pieces they are read again from the
    L1/L2.

    ``scale_factor`` float32: what the token's largest magnitude is multiplied by; ``code_factor``: clip /
    CODE_MAX. ``GROUP`` 0: no multipliers.
    """
    row = tl.program_id(0).to(tl.int64) * channels
    largest = tl.zeros([BLOCK], tl.float32)
    channel = tl.arange(0, BLOCK)
    x = tl.zeros([BLOCK], tl.float32)
    for block in tl.range(BLOCKS):
        offset = block * BLOCK + channel
        x = tl.load(x_pointer + row + offset, mask=offset < channels, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
    scale = tl.maximum(tl.max(largest, 0) * scale_factor, _TINY)
    tl.store(scale_pointer + tl.program_id(0), scale)
    for block in tl.range(BLOCKS):
        offset = block * BLOCK + channel
        if BLOCKS > 1:
            x = tl.load(x_pointer + row + offset, mask=offset < channels, other=0.0).to(tl.float32)
        if GROUP > 0:
            grouped = x.reshape(BLOCK // GROUP, GROUP)
            group_max = tl.max(tl.abs(grouped), 1)
            operand = fold(grouped, group_max, scale, code_factor, CODE_MAX).reshape(BLOCK)
        else:
            operand = round_to_code(x * tl.div_rn(1.0, scale), CODE_MAX)
        tl.store(operand_pointer + row + offset, operand.to(tl.int8), mask=offset < channels)


@triton.jit
def _smoothing_rows(
    x_pointer, order_pointer, row, channels, HAS_ORDER, GROUPS: tl.constexpr, GROUP: tl.constexpr
):
    """A token in its channel order, float32 ``[GROUPS, GROUP]``, zeros past the end, and its mask."""
    offset = tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = offset < channels
    source = offset
    if HAS_ORDER:
        source = tl.load(order_pointer + offset, mask=mask, other=0)
    x = tl.load(x_pointer + row + source, mask=mask, other=0.0).to(tl.float32)
    return x, offset, mask


@triton.jit
def _group_statistic(x, channels, NORMALIZE: tl.constexpr):
    magnitude = tl.abs(x)
    if NORMALIZE:
        mean_square = tl.sum(tl.sum(x * x, 1), 0) / channels
        magnitude = tl.div_rn(
            magnitude, tl.broadcast_to(tl.maximum(tl.sqrt_rn(mean_square), _TINY), magnitude.shape)
        )
    return tl.max(magnitude, 1)


@triton.jit
def smoothing_statistic_kernel(
    x_pointer,
    order_pointer,
    group_scale_pointer,
    channels,
    set_size,
    HAS_ORDER: tl.constexpr,
    NORMALIZE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Raise the set's group scales (int32 view of float32 >= 0) to this token's; order does not matter."""
    token = tl.program_id(0)
    row = token.to(tl.int64) * channels
    x, _, _ = _smoothing_rows(x_pointer, order_pointer, row, channels, HAS_ORDER, GROUPS, GROUP)
    statistic = tl.maximum(_group_statistic(x, channels, NORMALIZE), _TINY)
    group = tl.arange(0, GROUPS)
    groups = channels // GROUP
    target = group_scale_pointer + (token // set_size) * groups + group
    tl.atomic_max(target, statistic.to(tl.int32, bitcast=True), mask=group < groups, sem="relaxed")


@triton.jit
def quantize_smoothed_kernel(
    x_pointer,
    order_pointer,
    codes_pointer,
    scale_pointer,
    group_scale_pointer,
    channels,
    set_size,
    code_factor,
    CODE_MAX: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TOKEN_SCOPE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """One token: divide by the group scales, quantize. ``TOKEN_SCOPE``: compute and write them too."""
    token = tl.program_id(0)
    row = token.to(tl.int64) * channels
    x, offset, mask = _smoothing_rows(x_pointer, order_pointer, row, channels, HAS_ORDER, GROUPS, GROUP)
    group = tl.arange(0, GROUPS)
    groups = channels // GROUP
    group_pointers = group_scale_pointer + (token // set_size).to(tl.int64) * groups + group
    if TOKEN_SCOPE:
        group_scale = tl.maximum(_group_statistic(x, channels, NORMALIZE), _TINY)
        tl.store(group_pointers, group_scale, mask=group < groups)
    else:
        group_scale = tl.load(group_pointers, mask=group < groups, other=1.0)
    smoothed = x * tl.div_rn(tl.full(group_scale.shape, 1.0, tl.float32), group_scale)[:, None]
    scale = tl.maximum(tl.max(tl.max(tl.abs(smoothed), 1), 0) * code_factor, _TINY)
    tl.store(scale_pointer + token, scale)
    codes = round_to_code(smoothed * tl.div_rn(1.0, scale), CODE_MAX)
    tl.store(codes_pointer + row + offset, codes.to(tl.int8), mask=mask)
