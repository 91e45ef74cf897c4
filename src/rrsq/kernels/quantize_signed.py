"""Rotation of neighbouring channels and quantization to sixteen signed levels, in one pass.

Each block of channels is rotated by an orthonormal Hadamard matrix, in registers. Then each group has an
integer multiplier with a sign: the level without a counterpart, -8, goes to the side of the group's largest
magnitude. Among three multipliers the one of least squared error is taken; the token's largest magnitude is
never clipped by the middle one.

All of it is defined to the bit, so that every implementation gives the same codes. The rotation is a sequence
of sums and differences in float32, the same everywhere. What follows is computed in float16: groups are
first divided by the token's scale, and hardware does two such numbers at a time.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False, disable-error-code="assignment,misc"
# ruff: noqa: RUF005 - Triton knows no starred elements of tuples.

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ._triton import COMPILED, ceil_div, next_power_of_two, tl, triton
from .codes import code_max, code_scale, scale_of
from .operation import Constraints, operation

__all__ = [
    "SIGNED_MAX",
    "Cut",
    "cut_of",
    "load_units",
    "quantize_signed",
    "rotate_blocks",
    "rotated_units",
    "store_quantized",
    "store_units",
    "unit_of",
]

SIGNED_MAX = 15
"""Largest multiplier of a group: its largest code, -8, times it fits into int8."""
_LOWEST, _HIGHEST = 8.49, 7.49
"""Magnitudes, in steps, that are still rounded to -8 and to 7."""
_STEPS = (0, -1, 1)
"""The multipliers that are tried, relative to the least one that clips nothing."""
_PIECE = 2**17
"""Elements that the reference takes at a time."""


def _fake(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


def _sizes(x: Tensor, bits: int, group_size: int | None, block: int) -> tuple[tuple[str, int], ...]:
    sizes = ("channels", x.shape[1]), ("hadamard_block", block)
    return sizes if group_size is None else (*sizes, ("group_size", group_size))


def rotate_blocks(x: Tensor, block: int) -> Tensor:
    """``x @ R``, ``R`` block-diagonal with the orthonormal Sylvester matrix of order ``block``.

    Args:
        x: floating point ``[tokens, channels]``; ``block``, a power of two, divides ``channels``.
        block: channels that are mixed.

    Returns:
        float32 ``[tokens, channels]``, to the bit what every implementation computes.
    """
    return _butterflies(x, block).t().reshape(x.shape) * (1.0 / math.sqrt(block))


def _butterflies(x: Tensor, block: int) -> Tensor:
    """:func:`rotate_blocks` without the factor: sums and differences at distances 1, 2, 4, ...

    Float32 ``[block, tokens * channels / block]``. A block's channels lie apart from each other there: what
    is added lies in one piece.
    """
    columns = x.reshape(-1, block)
    y = torch.empty(columns.shape[::-1], dtype=torch.float32, device=x.device)
    for row, column in zip(y.unbind(0), columns.unbind(1), strict=True):
        row.copy_(column)
    spare, distance = torch.empty_like(y), 1
    while distance < block:
        first, second = y.unflatten(0, (-1, 2, distance)).unbind(1)
        sums, differences = spare.unflatten(0, (-1, 2, distance)).unbind(1)
        torch.add(first, second, out=sums)
        torch.sub(first, second, out=differences)
        y, spare, distance = spare, y, 2 * distance
    return y


@operation(
    fake=_fake,
    sizes=_sizes,
    dtypes=("x",),
    typical={"x": torch.bfloat16, "channels": 4096, "hadamard_block": 16, "group_size": 16},
    rows=True,
)
def quantize_signed(x: Tensor, bits: int, group_size: int | None, block: int) -> tuple[Tensor, Tensor]:
    """Rotate blocks of channels and quantize each token.

    With ``y`` the rotated token and ``A`` its largest magnitude: ``a = A / 105`` and ``r = y / a``, in
    float16. In a group, ``s = -1`` where the largest magnitude is positive, else 1; ``m_1`` in 1..15 is the
    least multiplier with which ``s r / m`` lies in -8.49..7.49. Of ``m_1``, ``m_1 - 1`` and ``m_1 + 1``,
    those in 1..15, ``m`` is the one of least squared error, the first among equals, with ``code =
    round(s r / m)`` in -8..7. The operand is ``s m code``, in ±120. Without groups: ``a = A / c``, ``code =
    round(y / a)`` in ±c, ``c = code_max(bits)``.

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
    operand = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    # A few tokens at a time: it takes some ten copies of them.
    rows = max(_PIECE // x.shape[1], 1)
    for part, to, scales in zip(x.split(rows), operand.split(rows), scale.split(rows), strict=True):
        codes, a = _quantized(part, bits, group_size, block)
        for column, row in zip(to.view(-1, codes.shape[0]).unbind(1), codes.unbind(0), strict=True):
            column.copy_(row)
        scales.copy_(a)
    return operand, scale


def _quantized(x: Tensor, bits: int, group_size: int | None, block: int) -> tuple[Tensor, Tensor]:
    """:func:`quantize_signed`, the former float32, with the channels of a group or a block apart."""
    tokens, channels = x.shape
    y = _butterflies(x, block)
    norm = 1.0 / math.sqrt(block)
    largest = torch.maximum(y.amax(0), -y.amin(0)).view(tokens, channels // block).amax(1) * norm
    if group_size is None:
        c = code_max(bits)
        scale = code_scale(largest, 1.0 / c)
        y.mul_((norm * (1.0 / scale)).repeat_interleave(channels // block))
        return y.round_().clamp_(-c, c), scale
    scale = code_scale(largest, 1.0 / (7 * SIGNED_MAX))
    y.mul_((norm * (1.0 / scale)).repeat_interleave(channels // block))
    if group_size != block:
        y = y.t().reshape(-1, group_size).t().contiguous()
    half = y.half()
    r = half.float()
    top, bottom = r.amax(0), -r.amin(0)
    sign = torch.where(top >= bottom, -1.0, 1.0)
    bound = torch.maximum(
        torch.maximum(top, bottom) * (1.0 / _LOWEST), torch.minimum(top, bottom) * (1.0 / _HIGHEST)
    )
    middle = bound.ceil().clamp(1, SIGNED_MAX)
    best, least = sign, torch.full_like(top, torch.inf, dtype=torch.float16)
    codes = y
    for step in _STEPS:
        m = (middle + step).clamp(1, SIGNED_MAX) * sign
        _codes(r, m, codes)
        # A code times a multiplier is exact.
        error = _sum_of_squares(half.copy_(torch.addcmul(r, codes, m, value=-1, out=codes)))
        best = torch.where(error < least, m, best)
        least = torch.minimum(error, least)
    return _codes(r, best, codes).mul_(best), scale


def _codes(r: Tensor, multiplier: Tensor, out: Tensor) -> Tensor:
    return torch.mul(r, (1.0 / multiplier).half().float(), out=out).round_().clamp_(-8, 7)


def _sum_of_squares(error: Tensor) -> Tensor:
    """Over the first dimension, in order, every square and sum rounded to float16; ``error`` is squared."""
    total, *others = error.mul_(error).unbind(0)
    for square in others:
        total.add_(square)
    return total.clone()


_LEAST_LEVEL = tl.constexpr(1.0 / 8.49)
_GREATEST_LEVEL = tl.constexpr(1.0 / 7.49)
_TOP = tl.constexpr(15.0)
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def _to_halves(value, PTX: tl.constexpr):
    """float32 to float16, two at a time."""
    if PTX:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [value], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        return value.to(tl.float16)


@triton.jit
def _rounded(r, inverse, LIMIT: tl.constexpr, PTX: tl.constexpr):
    """``r * inverse`` to the nearest integer, ties to even, all float16; with ``LIMIT`` in -8..7.

    In one multiplication and addition: next to 1536 float16 has no fractions.
    """
    if PTX:
        if LIMIT:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 t, a, b, c; mov.b32 a, 0x66006600; mov.b32 b, 0x65F865F8; mov.b32 c, 0x66076607;"
                " fma.rn.f16x2 t, $1, $2, a; max.f16x2 t, t, b; min.f16x2 t, t, c; sub.rn.f16x2 $0, t, a; }",
                "=r,r,r",
                [r, inverse],
                dtype=tl.float16,
                is_pure=True,
                pack=2,
            )
        else:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 t, a; mov.b32 a, 0x66006600;"
                " fma.rn.f16x2 t, $1, $2, a; sub.rn.f16x2 $0, t, a; }",
                "=r,r,r",
                [r, inverse],
                dtype=tl.float16,
                is_pure=True,
                pack=2,
            )
    else:
        code = r.to(tl.float32) * inverse.to(tl.float32)
        code = (code + _ROUNDER) - _ROUNDER
        return tl.minimum(tl.maximum(code, -8.0), 7.0).to(tl.float16)


@triton.jit
def _squared_error(r, code, minus, PTX: tl.constexpr):
    """``(r + code * minus)^2``, float16; the sum is exact."""
    if PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; fma.rn.f16x2 t, $2, $3, $1; mul.rn.f16x2 $0, t, t; }",
            "=r,r,r,r",
            [r, code, minus],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        error = (r.to(tl.float32) + code.to(tl.float32) * minus.to(tl.float32)).to(tl.float16)
        return error * error


@triton.jit
def _added(a, b, PTX: tl.constexpr):
    if PTX:
        return tl.inline_asm_elementwise(
            "add.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        return a + b


@triton.jit
def _greater(a, b, PTX: tl.constexpr):
    if PTX:
        return tl.inline_asm_elementwise(
            "max.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        return tl.maximum(a, b)


@triton.jit
def _less(a, b, PTX: tl.constexpr):
    if PTX:
        return tl.inline_asm_elementwise(
            "min.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        return tl.minimum(a, b)


@triton.jit
def _bytes_of_products(a, b, c, d, m, PTX: tl.constexpr):
    """``a * m`` to ``d * m`` as the four bytes of int32; whole float16 numbers."""
    if PTX:
        # Next to 1536 the last byte of a float16 is an int8. $0, $1: the words of two groups.
        return tl.inline_asm_elementwise(
            "{ .reg .b32 a, b, c, d, e; mov.b32 e, 0x66006600;"
            " fma.rn.f16x2 a, $2, $6, e; fma.rn.f16x2 b, $3, $6, e;"
            " fma.rn.f16x2 c, $4, $6, e; fma.rn.f16x2 d, $5, $6, e;"
            " prmt.b32 a, a, b, 0x6240; prmt.b32 c, c, d, 0x6240;"
            " prmt.b32 $0, a, c, 0x5410; prmt.b32 $1, a, c, 0x7632; }",
            "=&r,=&r,r,r,r,r,r",
            [a, b, c, d, m],
            dtype=tl.int32,
            is_pure=True,
            pack=2,
        )
    else:
        return _bytes(
            (a * m).to(tl.int32), (b * m).to(tl.int32), (c * m).to(tl.int32), (d * m).to(tl.int32), PTX
        )


@triton.jit
def _bytes(a, b, c, d, PTX: tl.constexpr):
    """The last bytes of four int32 as one."""
    if PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 a, b; prmt.b32 a, $1, $2, 0x0040; prmt.b32 b, $3, $4, 0x0040;"
            " prmt.b32 $0, a, b, 0x5410; }",
            "=r,r,r,r,r",
            [a, b, c, d],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        return (a & 255) | ((b & 255) << 8) | ((c & 255) << 16) | (d << 24)


@triton.jit
def load_units(pointer, unit, units, PIECE: tl.constexpr, UNIT: tl.constexpr):
    """``UNIT`` neighbouring channels of each of ``unit``, int32 ``[n]``, as a tuple of float32 ``[n]``.

    A thread reads 16 bytes at a time and has all channels of its units.
    """
    channels = ()
    for piece in tl.static_range(UNIT // PIECE):
        if pointer.dtype.element_ty == tl.bfloat16:
            offset = (unit[:, None] * UNIT + piece * PIECE) // 2 + tl.arange(0, PIECE // 2)[None, :]
            words = pointer.to(tl.pointer_type(tl.int32), bitcast=True)
            x = tl.load(words + offset, mask=(unit < units)[:, None], other=0)
            channels = channels + _halves_of_words(_columns(x, unit.shape[0], PIECE // 2), PIECE // 2)
        else:
            offset = unit[:, None] * UNIT + piece * PIECE + tl.arange(0, PIECE)[None, :]
            x = tl.load(pointer + offset, mask=(unit < units)[:, None], other=0.0).to(tl.float32)
            channels = channels + _columns(x, unit.shape[0], PIECE)
    return channels


@triton.jit
def _halves_of_words(words, COUNT: tl.constexpr):
    """Two bfloat16 a word as float32."""
    values = ()
    for i in tl.static_range(COUNT):
        low, high = words[i] << 16, words[i] & -65536
        values = values + (low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True))
    return values


@triton.jit
def _columns(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The columns of ``x`` ``[ROWS, COLUMNS]``, each ``[ROWS]``."""
    if COLUMNS == 1:
        return (x.reshape(ROWS),)
    else:
        left, right = tl.split(x.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1))
        return _columns(left, ROWS, COLUMNS // 2) + _columns(right, ROWS, COLUMNS // 2)


@triton.jit
def rotated_units(x, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """:func:`_butterflies` of a tuple of channels."""
    for level in tl.static_range(8):
        if (1 << level) < BLOCK:
            y = ()
            for i in tl.static_range(UNIT):
                if i & (1 << level):
                    y = y + (x[i - (1 << level)] - x[i],)
                else:
                    y = y + (x[i] + x[i + (1 << level)],)
            x = y
    return x


@triton.jit
def _largest_bits(y, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """The largest magnitude of a tuple of channels, as the integer of its bits; NaN's where there is one.

    Maxima of floats pass over NaN, but the first channel of a block is the sum of all.
    """
    largest = tl.abs(y[0])
    for i in tl.static_range(1, UNIT):
        largest = tl.maximum(largest, tl.abs(y[i]))
    bits = largest.to(tl.int32, bitcast=True)
    for i in tl.static_range(0, UNIT, BLOCK):
        bits = tl.maximum(bits, tl.abs(y[i]).to(tl.int32, bitcast=True))
    return bits


@triton.jit
def _signed_words(y, factor, GROUP: tl.constexpr, PTX: tl.constexpr):
    """The operands of a group, four a word; ``y`` ``GROUP`` channels float32 ``[n]``, ``factor`` to 1 / a."""
    r = ()
    for i in tl.static_range(GROUP):
        r = r + (_to_halves(y[i] * factor, PTX),)
    greatest, least = r[0], r[0]
    for i in tl.static_range(1, GROUP):
        greatest = _greater(greatest, r[i], PTX)
        least = _less(least, r[i], PTX)
    top = greatest.to(tl.float32)
    bottom = -least.to(tl.float32)
    sign = tl.where(top >= bottom, -1.0, 1.0)
    bound = tl.maximum(tl.maximum(top, bottom) * _LEAST_LEVEL, tl.minimum(top, bottom) * _GREATEST_LEVEL)
    middle = tl.minimum(tl.maximum(tl.ceil(bound), 1.0), _TOP)
    lower, upper = tl.maximum(middle - 1.0, 1.0), tl.minimum(middle + 1.0, _TOP)
    best, least = middle, _error(r, middle * sign, GROUP, False, PTX)
    error = _error(r, lower * sign, GROUP, True, PTX)
    best, least = tl.where(error < least, lower, best), tl.minimum(error, least)
    error = _error(r, upper * sign, GROUP, False, PTX)
    best = tl.where(error < least, upper, best)
    m, inverse = _reciprocal(best * sign, PTX)
    words = ()
    for i in tl.static_range(0, GROUP, 4):
        words = words + (
            _bytes_of_products(
                _rounded(r[i], inverse, True, PTX),
                _rounded(r[i + 1], inverse, True, PTX),
                _rounded(r[i + 2], inverse, True, PTX),
                _rounded(r[i + 3], inverse, True, PTX),
                m,
                PTX,
            ),
        )
    return words


@triton.jit
def _reciprocal(m, PTX: tl.constexpr):
    """``m`` and ``1 / m``, float16, of float32 whole numbers.

    Where the reciprocal is off by a unit in the last place of float32, float16 is the same: no 1 / m is so
    near to a tie.
    """
    if PTX:
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [m], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        inverse = 1.0 / m
    return _to_halves(m, PTX), _to_halves(inverse, PTX)


@triton.jit
def _error(r, multiplier, GROUP: tl.constexpr, LIMIT: tl.constexpr, PTX: tl.constexpr):
    """The squared error of a group with a signed multiplier, float32."""
    m, inverse = _reciprocal(multiplier, PTX)
    minus = -m
    error = _squared_error(r[0], _rounded(r[0], inverse, LIMIT, PTX), minus, PTX)
    for i in tl.static_range(1, GROUP):
        square = _squared_error(r[i], _rounded(r[i], inverse, LIMIT, PTX), minus, PTX)
        error = _added(error, square, PTX)
    return error.to(tl.float32)


@triton.jit
def _code_words(y, factor, UNIT: tl.constexpr, PTX: tl.constexpr):
    """``round(y * factor)``, four a word."""
    words = ()
    for i in tl.static_range(0, UNIT, 4):
        words = words + (
            _bytes(
                (y[i] * factor + _ROUNDER).to(tl.int32, bitcast=True),
                (y[i + 1] * factor + _ROUNDER).to(tl.int32, bitcast=True),
                (y[i + 2] * factor + _ROUNDER).to(tl.int32, bitcast=True),
                (y[i + 3] * factor + _ROUNDER).to(tl.int32, bitcast=True),
                PTX,
            ),
        )
    return words


@triton.jit
def _part(values, START: tl.constexpr, COUNT: tl.constexpr):
    part = ()
    for i in tl.static_range(COUNT):
        part = part + (values[START + i],)
    return part


@triton.jit
def _store_words(pointer, unit, units, words, WORDS: tl.constexpr):
    """``WORDS`` neighbouring int32 of each of ``unit``, four at a time where there are as many."""
    if WORDS == 1:
        tl.store(pointer + unit, words[0], mask=unit < units)
    elif WORDS == 2:
        offset = unit[:, None] * 2 + tl.arange(0, 2)[None, :]
        tl.store(pointer + offset, tl.join(words[0], words[1]), mask=(unit < units)[:, None])
    else:
        for i in tl.static_range(0, WORDS, 4):
            even, odd = tl.join(words[i], words[i + 2]), tl.join(words[i + 1], words[i + 3])
            four = tl.join(even, odd).reshape(unit.shape[0], 4)
            offset = unit[:, None] * WORDS + i + tl.arange(0, 4)[None, :]
            tl.store(pointer + offset, four, mask=(unit < units)[:, None])


@triton.jit
def _quantize_kernel(
    x_pointer,
    operand_pointer,
    scale_pointer,
    channels,
    scale_factor,
    normalization,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    UNITS: tl.constexpr,
    PARTS: tl.constexpr,
    PIECE: tl.constexpr,
    PTX: tl.constexpr,
):
    """One token, in ``PARTS`` times ``UNITS`` units of ``UNIT`` channels, all in registers.

    A thread has whole units, so that neither rotations nor groups leave it. ``GROUP`` 0: no multipliers.
    ``operand_pointer``: int8, written as words of four. ``scale_factor``: what the token's largest magnitude
    is multiplied by. ``normalization``: 1 / sqrt(BLOCK). ``PIECE``: channels of 16 bytes.
    """
    token = tl.program_id(0)
    start = token.to(tl.int64) * channels
    units = channels // UNIT
    unit = tl.arange(0, UNITS)
    parts = ()
    for part in tl.static_range(PARTS):
        x = load_units(x_pointer + start, unit + part * UNITS, units, PIECE, UNIT)
        parts = parts + (rotated_units(x, UNIT, BLOCK),)
    store_quantized(
        parts,
        operand_pointer + start,
        scale_pointer + token,
        unit,
        units,
        scale_factor,
        normalization,
        GROUP,
        BLOCK,
        UNIT,
        UNITS,
        PARTS,
        PTX,
    )


@triton.jit
def store_quantized(
    parts,
    operand_pointer,
    scale_pointer,
    unit,
    units,
    scale_factor,
    normalization,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    UNITS: tl.constexpr,
    PARTS: tl.constexpr,
    PTX: tl.constexpr,
):
    """Quantize one token: ``parts`` of rotated units, without the factor ``normalization``.

    ``operand_pointer``: int8, at the token's first channel.
    """
    word_pointer = operand_pointer.to(tl.pointer_type(tl.int32), bitcast=True)
    largest = tl.zeros([UNITS], tl.int32)
    for part in tl.static_range(PARTS):
        largest = tl.maximum(largest, _largest_bits(parts[part], UNIT, BLOCK))
    largest_y = tl.max(largest, 0).to(tl.float32, bitcast=True)
    scale = scale_of(largest_y * normalization, scale_factor)
    tl.store(scale_pointer, scale)
    factor = normalization * tl.div_rn(1.0, scale)
    for part in tl.static_range(PARTS):
        y = parts[part]
        words = ()
        if GROUP > 0:
            for group in tl.static_range(0, UNIT, GROUP):
                words = words + _signed_words(_part(y, group, GROUP), factor, GROUP, PTX)
        else:
            words = _code_words(y, factor, UNIT, PTX)
        _store_words(word_pointer, unit + part * UNITS, units, words, UNIT // 4)


@triton.jit
def store_units(pointer, unit, units, x, PIECE: tl.constexpr, UNIT: tl.constexpr):
    """What :func:`load_units` reads; ``x`` in the dtype of the pointer already, but for its width."""
    for piece in tl.static_range(UNIT // PIECE):
        offset = unit[:, None] * UNIT + piece * PIECE + tl.arange(0, PIECE)[None, :]
        columns = _joined(_part(x, piece * PIECE, PIECE), unit.shape[0], PIECE)
        tl.store(pointer + offset, columns.to(pointer.dtype.element_ty), mask=(unit < units)[:, None])


@triton.jit
def _joined(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``[ROWS, COLUMNS]`` of its columns, each ``[ROWS]``: undoes :func:`_columns`."""
    if COLUMNS == 1:
        return x[0].reshape(ROWS, 1)
    else:
        left = _joined(_part(x, 0, COLUMNS // 2), ROWS, COLUMNS // 2)
        right = _joined(_part(x, COLUMNS // 2, COLUMNS // 2), ROWS, COLUMNS // 2)
        return tl.join(left, right).permute(0, 2, 1).reshape(ROWS, COLUMNS)


_FEW_TOKENS = 64
_THREADS = 128
_LARGEST_WARPS = 16
_REGISTERS = 128
"""Of a thread, for its rotated channels."""


@dataclass(frozen=True)
class Cut:
    """How a token is cut among threads; see :func:`_quantize_kernel`."""

    units: int
    parts: int
    warps: int


@functools.lru_cache(maxsize=1024)
def cut_of(tokens: int, channels: int, unit: int) -> Cut:
    """Two units a thread and part, which float16 arithmetic takes at a time; few tokens get more threads."""
    units = next_power_of_two(ceil_div(channels, unit))
    threads = units if tokens <= _FEW_TOKENS else min(units // 2, _THREADS)
    warps = min(max(threads // 32, 1), _LARGEST_WARPS)
    while warps < _LARGEST_WARPS and units * unit > 32 * warps * _REGISTERS:
        warps *= 2
    at_a_time = max(min(units, 2 * 32 * warps), 32 * warps)
    return Cut(at_a_time, ceil_div(channels, unit * at_a_time), warps)


def unit_of(channels: int, group_size: int | None, block: int) -> int:
    """Neighbouring channels of one thread: whole groups and blocks, and 16 bytes of operands if possible."""
    unit = max(block, group_size or 0, 4)
    while unit < 16 and channels % (2 * unit) == 0:
        unit *= 2
    return unit


def _prepare(
    x: Tensor, bits: int, group_size: int | None, block: int, cut: Cut | None = None
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """See :meth:`~rrsq.kernels.operation.Operation.prepare`; with ``cut`` it decides."""
    channels = x.shape[-1]
    if cut is None:
        cut = cut_of(x.numel() // channels, channels, unit_of(channels, group_size, block))
    return _prepared(channels, x.element_size(), x.device, bits, group_size, block, cut)


@functools.lru_cache(maxsize=1024)  # What is compiled asks in each call.
def _prepared(
    channels: int,
    element_size: int,
    device: torch.device,
    bits: int,
    group_size: int | None,
    block: int,
    cut: Cut,
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    unit = unit_of(channels, group_size, block)
    units, parts, warps = cut.units, cut.parts, cut.warps
    scale_factor = 1.0 / (code_max(bits) if group_size is None else 7 * SIGNED_MAX)
    normalization, group, piece = 1.0 / math.sqrt(block), group_size or 0, min(16 // element_size, unit)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        tokens = x.numel() // channels
        operand = torch.empty_like(x, dtype=torch.int8)
        scale = torch.empty(tokens, dtype=torch.float32, device=device)
        if tokens:
            _quantize_kernel[(tokens,)](
                x,
                operand,
                scale,
                channels,
                scale_factor,
                normalization,
                group,
                block,
                unit,
                units,
                parts,
                piece,
                COMPILED,
                enable_fp_fusion=False,
                num_warps=warps,
            )
        return operand, scale

    return run


@quantize_signed.kernel(
    "triton",
    Constraints.on_gpu(
        dtypes={"x": frozenset({torch.float16, torch.bfloat16, torch.float32})},
        divisible={"channels": 4},
        at_least={"group_size": 4},
        at_most={"hadamard_block": 64, "group_size": 64, "channels": 65536},
        power_of_two=frozenset({"hadamard_block", "group_size"}),
    ),
)
def _launch(x: Tensor, bits: int, group_size: int | None, block: int) -> tuple[Tensor, Tensor]:
    return _prepare(x, bits, group_size, block)(x)


_launch.prepare = _prepare  # type: ignore[attr-defined]
