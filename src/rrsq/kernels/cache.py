"""Cached keys and values in 4 or 8 bits: how they are stored, for the operations that write and read them.

A cache holds codes ``[blocks, kv_heads, block_size, head_dim * bits / 8]`` with scales and minima ``[blocks,
kv_heads, block_size, groups]``: :class:`CachePages`. Without a block table there is one block a sequence, and
``block_size`` is its capacity; with one (int32 ``[batch, blocks of a sequence]``) token ``n`` lies in block
``table[b, n // block_size]``, row ``n % block_size``, as in vLLM.

Keys are stored after RoPE. What is stored is ``(k - RoPE_p(mu)) D H``: a calibrated offset ``mu``, which was
found before RoPE and is rotated to the key's position ``p``, is taken off, channels are multiplied by powers
of two, and a Hadamard matrix applied.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._triton import COMPILED, tl, triton
from .codes import code_max

__all__ = [
    "CachePages",
    "angles",
    "chunk_size",
    "decode_cache",
    "dequantized_chunk",
    "encode_cache",
    "inverse_power",
    "offset_keys",
    "page_shapes",
    "rope_of_offset",
    "rotated_halves",
    "signs_as",
    "turned",
]

_HALF_MAX = torch.finfo(torch.float16).max
_HALF_TINY = 2.0**-24
_COMPILED = tl.constexpr(COMPILED)


def _assembly(nibbles: bool, zero: int) -> str:
    """Numbers of four bytes, less ``zero``: two registers of float16; of nibbles two and two."""
    registers = "b, l, h" if nibbles else "b"
    lines = [f".reg .b32 {registers};", f"mov.b32 b, {0x64006400 + 0x10001 * zero:#x};"]
    sources: tuple[str, ...] = ("$2",)
    if nibbles:
        lines += ["and.b32 l, $4, 0x0F0F0F0F;", "shr.u32 h, $4, 4;", "and.b32 h, h, 0x0F0F0F0F;"]
        sources = ("l", "h")
    for index, source in enumerate(sources):
        for part, selector in enumerate(("0x5150", "0x5352")):
            lines.append(f"prmt.b32 ${2 * index + part}, {source}, 0x64646464, {selector};")
    lines += [f"sub.f16x2 ${index}, ${index}, b;" for index in range(2 * len(sources))]
    return "{" + " ".join(lines) + "}"


_NIBBLES = tl.constexpr(_assembly(True, 0))
_SIGNED_NIBBLES = tl.constexpr(_assembly(True, 8))
_BYTES = tl.constexpr(_assembly(False, 0))
_SIGNED_BYTES = tl.constexpr(_assembly(False, 128))


def _signs_assembly(one: int) -> str:
    """``one``, a number of 16 bits, with the signs of four bytes: two registers."""
    lines = ["prmt.b32 $0, $2, 0, 0x1404;", "prmt.b32 $1, $2, 0, 0x3424;"]
    for register in ("$0", "$1"):
        lines += [
            f"and.b32 {register}, {register}, 0x80008000;",
            f"or.b32 {register}, {register}, {one * 0x10001:#x};",
        ]
    return "{" + " ".join(lines) + "}"


_SIGNS16 = tl.constexpr(_signs_assembly(0x3C00))
_SIGNS_B16 = tl.constexpr(_signs_assembly(0x3F80))


class CachePages(NamedTuple):
    """The storage of one layer's keys and values; a minimum is None where codes are symmetric."""

    key_codes: Tensor
    key_scale: Tensor
    key_minimum: Tensor | None
    value_codes: Tensor
    value_scale: Tensor
    value_minimum: Tensor | None

    @property
    def block_size(self) -> int:
        """Tokens a block."""
        return self.key_codes.shape[2]

    def clone(self) -> CachePages:
        """A copy of all of it."""
        copies: list[Any] = [None if tensor is None else tensor.clone() for tensor in self]
        return CachePages(*copies)


def page_shapes(head_dim: int, bits: int, group_size: int) -> tuple[int, int]:
    """Bytes of codes and number of scales of one token and head."""
    return head_dim * bits // 8, head_dim // group_size


def encode_cache(
    x: Tensor, bits: int, group_size: int, zero_point: bool, signed: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize along the last dimension in groups.

    Symmetric: codes of ±code_max whose outermost rounding cells end at the largest magnitude. With a zero
    point: ``2**bits`` levels from the group's minimum to its maximum. Signed: all ``2**bits`` codes; the
    scale is negative where the largest magnitude is positive, so that this is the lowest code, which has no
    counterpart. The scale is rounded to float16 first, so that what is stored is what was used.

    Args:
        x: ``[..., head_dim]`` floating point.
        bits: 4 (two codes a byte: entry ``j`` low, ``j + head_dim/2`` high) or 8.
        group_size: divides ``head_dim``.
        zero_point: store the group's minimum too.
        signed: give scales a sign; not with a zero point.

    Returns:
        ``codes`` uint8 ``[..., head_dim * bits / 8]``, ``scale`` float16 ``[..., groups]`` and ``minimum``
        float16 ``[..., groups]`` or None.
    """
    grouped = x.float().unflatten(-1, (-1, group_size))
    if zero_point:
        low = grouped.amin(-1).clamp(-_HALF_MAX, _HALF_MAX).half()
        span = grouped.amax(-1) - low.float()
        scale = (span / (2**bits - 1)).clamp(_HALF_TINY, _HALF_MAX).half()
        codes = (grouped - low.float().unsqueeze(-1)) / scale.float().unsqueeze(-1)
        codes = codes.round().clamp(0, 2**bits - 1)
    elif signed:
        low, lowest = None, 2.0 ** (bits - 1)
        top, bottom = grouped.amax(-1), -grouped.amin(-1)
        scale = (torch.maximum(top, bottom) / lowest).clamp(_HALF_TINY, _HALF_MAX)
        scale = torch.where(top >= bottom, -scale, scale).half()
        codes = (grouped / scale.float().unsqueeze(-1)).round().clamp(-lowest, lowest - 1) + lowest
    else:
        low = None
        top = code_max(bits)
        scale = (grouped.abs().amax(-1) / (top + 0.5)).clamp(_HALF_TINY, _HALF_MAX).half()
        codes = (grouped / scale.float().unsqueeze(-1)).round().clamp(-top, top) + (top + 1)
    codes = codes.flatten(-2).to(torch.uint8)
    if bits == 4:
        half = codes.shape[-1] // 2
        codes = codes[..., :half] | (codes[..., half:] << 4)
    return codes, scale, low


def decode_cache(codes: Tensor, scale: Tensor, minimum: Tensor | None, bits: int) -> Tensor:
    """Undo :func:`encode_cache`: float32 ``[..., head_dim]``."""
    if bits == 4:
        codes = torch.cat((codes & 0xF, codes >> 4), dim=-1)
    grouped = codes.float().unflatten(-1, (scale.shape[-1], -1))
    if minimum is None:
        grouped = grouped - (code_max(bits) + 1)
    values = grouped * scale.float().unsqueeze(-1)
    if minimum is not None:
        values = values + minimum.float().unsqueeze(-1)
    return values.flatten(-2)


def angles(positions: Tensor, frequencies: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE, float32 ``[..., rotary / 2]``, times ``scale``.

    In float64, since a float32 angle at position 100,000 is off by 1/200.
    """
    turned = positions.double().unsqueeze(-1) * frequencies
    return (turned.cos() * scale).float(), (turned.sin() * scale).float()


def offset_keys(
    offset: Tensor, sink: Tensor | None, positions: Tensor, frequencies: Tensor | None, scale: float
) -> Tensor:
    """RoPE of the keys' offset, float32 ``[batch, kv_heads, tokens, head_dim]``.

    Args:
        offset: float32 ``[kv_heads, head_dim]``.
        sink: the same for position 0, whose key is unlike all others (attention sinks, arXiv 2309.17453);
            None: it has that of the others.
        positions: int ``[batch, tokens]``.
        frequencies: float64 ``[rotary / 2]``, of the pairs ``(j, j + rotary / 2)``; channels beyond
            ``rotary`` stay. None: no RoPE.
        scale: of cosines and sines (scaled RoPE).
    """
    batch, tokens = positions.shape
    whole = offset[None, :, None, :].expand(batch, -1, tokens, -1)
    if sink is not None:
        whole = torch.where((positions == 0)[:, None, :, None], sink[None, :, None, :], whole)
    if frequencies is None:
        return whole
    cos, sin = (x.unsqueeze(1) for x in angles(positions, frequencies, scale))
    half = frequencies.shape[0]
    first, second, rest = whole.split((half, half, offset.shape[1] - 2 * half), dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*turned, rest.expand(*turned[0].shape[:-1], -1)), dim=-1)


@triton.jit
def _numbers(codes, BITS: tl.constexpr, SIGNED: tl.constexpr):
    """The numbers that bytes stand for, float16: the low and the high nibbles', or of 8 bits twice the same.

    On a GPU four bytes at a time: a number in the mantissa of 1024, less 1024; conversions of single integers
    would take most of the time of decoding.
    """
    if _COMPILED:
        if BITS == 4:
            return tl.inline_asm_elementwise(
                _SIGNED_NIBBLES if SIGNED else _NIBBLES,
                "=&r,=&r,=&r,=&r,r",
                [codes],
                dtype=(tl.float16, tl.float16),
                is_pure=True,
                pack=4,
            )
        number = tl.inline_asm_elementwise(
            _SIGNED_BYTES if SIGNED else _BYTES, "=&r,=&r,r", [codes], dtype=tl.float16, is_pure=True, pack=4
        )
        return number, number
    zero: tl.constexpr = 2.0 ** (BITS - 1) if SIGNED else 0.0
    if BITS == 4:
        return (codes & 0xF).to(tl.float16) - zero, (codes >> 4).to(tl.float16) - zero
    return codes.to(tl.float16) - zero, codes.to(tl.float16) - zero


@triton.jit
def _scaled(
    number,
    scale_pointer,
    minimum_pointer,
    rows,
    valid,
    first,
    inside,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    ONE: tl.constexpr,
    WHOLE: tl.constexpr,
    MINIMUM: tl.constexpr,
):
    """Numbers of ``CHUNK`` channels from ``first`` on, by their scales and minima.

    ``ONE``: they have one. ``WHOLE``: of several groups all channels.
    """
    if WHOLE:
        place = rows[:, None] + (first // GROUP + tl.arange(0, CHUNK // GROUP))[None, :]
        scale = tl.load(scale_pointer + place, mask=valid[:, None], other=0.0)[:, :, None]
        if MINIMUM:
            minimum = tl.load(minimum_pointer + place, mask=valid[:, None], other=0.0)[:, :, None]
        number = number.reshape(valid.shape[0], CHUNK // GROUP, GROUP)
    elif ONE:
        place = rows + first // GROUP
        scale = tl.load(scale_pointer + place, mask=valid, other=0.0)[:, None]
        if MINIMUM:
            minimum = tl.load(minimum_pointer + place, mask=valid, other=0.0)[:, None]
    else:
        place = rows[:, None] + ((first + tl.arange(0, CHUNK)) // GROUP)[None, :]
        scale = tl.load(scale_pointer + place, mask=inside, other=0.0)
        if MINIMUM:
            minimum = tl.load(minimum_pointer + place, mask=inside, other=0.0)
    number = number * scale
    if MINIMUM:
        number = number + minimum
    if WHOLE:
        number = number.reshape(valid.shape[0], CHUNK)
    return number


@triton.jit
def dequantized_chunk(
    codes_pointer,
    scale_pointer,
    minimum_pointer,
    code_rows,
    scale_rows,
    valid,
    chunk: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    CHUNK: tl.constexpr,
    MINIMUM: tl.constexpr,
):
    """Chunk ``chunk`` of the lower and of the upper half of the channels of some cached tokens.

    Args:
        codes_pointer, scale_pointer, minimum_pointer: of :class:`CachePages`.
        code_rows, scale_rows: where each token's codes and scales begin.
        valid: the tokens that there are.
        chunk: of ``CHUNK`` channels, a power of two: :func:`chunk_size`, or all.

    Returns:
        Two of float16 ``[tokens, CHUNK]``. What is not ``valid`` and what lies beyond ``HALF`` channels is
        finite (zero codes, zero scale).
    """
    first: tl.constexpr = chunk * CHUNK
    # Loads of whole rows are wide ones; a mask of channels would stand in the way.
    ONE: tl.constexpr = HALF % CHUNK == 0 and GROUP % CHUNK == 0
    WHOLE: tl.constexpr = HALF % CHUNK == 0 and CHUNK % GROUP == 0 and CHUNK > GROUP
    channel = first + tl.arange(0, CHUNK)
    inside = valid[:, None] & (channel < HALF)[None, :]
    place = code_rows[:, None] + channel[None, :]
    if ONE:
        inside = valid[:, None]
    if BITS == 4:
        low, high = _numbers(tl.load(codes_pointer + place, mask=inside, other=0), BITS, not MINIMUM)
    else:
        low, _ = _numbers(tl.load(codes_pointer + place, mask=inside, other=0), BITS, not MINIMUM)
        high, _ = _numbers(tl.load(codes_pointer + place + HALF, mask=inside, other=0), BITS, not MINIMUM)
    low = _scaled(
        low,
        scale_pointer,
        minimum_pointer,
        scale_rows,
        valid,
        first,
        inside,
        GROUP,
        CHUNK,
        ONE,
        WHOLE,
        MINIMUM,
    )
    high = _scaled(
        high,
        scale_pointer,
        minimum_pointer,
        scale_rows,
        valid,
        HALF + first,
        inside,
        GROUP,
        CHUNK,
        ONE,
        WHOLE,
        MINIMUM,
    )
    return low, high


def chunk_size(head_dim: int, group_size: int) -> int:
    """Channels that :func:`dequantized_chunk` takes at once: of one scale each where groups allow it."""
    half = head_dim // 2
    return 32 if half % 32 == 0 and group_size % 32 == 0 else 16


@triton.jit
def turned(turns):
    """Cosine and sine, float32, of an angle in turns (of one or more), float32 or float64.

    On a GPU by the approximations of its special function unit, whose error is below 2^-20 near zero: the
    full functions take twenty times as long.
    """
    angle = ((turns - tl.floor(turns + 0.5)) * 6.283185307179586).to(tl.float32)
    if _COMPILED:
        cos = tl.inline_asm_elementwise(
            "cos.approx.f32 $0, $1;", "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1
        )
        sin = tl.inline_asm_elementwise(
            "sin.approx.f32 $0, $1;", "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1
        )
        return cos, sin
    return tl.cos(angle), tl.sin(angle)


@triton.jit
def inverse_power(x):
    """``1 / x`` of float32 powers of two, exact, by their exponents."""
    return (0x7F000000 - x.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def signs_as(matrix, dtype: tl.constexpr):
    """A matrix of ±1, int8, in float16 or bfloat16.

    On a GPU by the sign bits of four bytes at a time: conversions of integers are far slower.
    """
    if not _COMPILED:
        result = matrix.to(dtype)
    elif dtype == tl.float16:
        result = tl.inline_asm_elementwise(
            _SIGNS16, "=r,=r,r", [matrix], dtype=tl.float16, is_pure=True, pack=4
        )
    else:
        result = tl.inline_asm_elementwise(
            _SIGNS_B16, "=r,=r,r", [matrix], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    return result


@triton.jit
def _product(x, matrix):
    """``x`` times a matrix of ±1, which is exact in 16 bits, float32: by parts of 16 bits."""
    if not _COMPILED:
        return tl.dot(x.to(tl.float32), matrix.to(tl.float32), input_precision="ieee")
    if x.dtype == tl.float32:
        upper = x.to(tl.bfloat16)
        lower = (x - upper.to(tl.float32)).to(tl.bfloat16)
        sign = signs_as(matrix, tl.bfloat16)
        product = tl.dot(lower, sign, tl.dot(upper, sign))
    else:
        product = tl.dot(x, signs_as(matrix, x.dtype))
    return product


@triton.jit
def rotated_halves(low, high, signs, HALF: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr):
    """``x H``, float32, of the halves of the channels of some rows; ``signs`` int8, ``sqrt(HEAD_DIM) H``."""
    channel = tl.arange(0, PADDED)
    inside = channel < HALF
    square = inside[:, None] & inside[None, :]
    corner = signs + channel[:, None] * HEAD_DIM + channel[None, :]
    norm: tl.constexpr = HEAD_DIM**-0.5
    new_low = _product(low, tl.load(corner, mask=square, other=0))
    new_low += _product(high, tl.load(corner + HALF * HEAD_DIM, mask=square, other=0))
    new_high = _product(low, tl.load(corner + HALF, mask=square, other=0))
    new_high += _product(high, tl.load(corner + HALF * HEAD_DIM + HALF, mask=square, other=0))
    return new_low * norm, new_high * norm


@triton.jit
def rope_of_offset(
    mean,
    sink,
    base,
    frequencies,
    rope_scale,
    FIRST: tl.constexpr,
    HALF: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    PADDED: tl.constexpr,
    SINK: tl.constexpr,
):
    """The keys' offset at positions ``base`` (float64 ``[tokens]``), channels from ``FIRST`` on.

    ``mean``, ``sink``: of one head; see :func:`offset_keys`.
    """
    channel = FIRST + tl.arange(0, PADDED)
    inside = tl.arange(0, PADDED) < HALF
    own = tl.load(mean + channel, mask=inside, other=0.0)[None, :] + tl.zeros([base.shape[0], 1], tl.float32)
    if SINK:  # RoPE does not turn position 0: the channel of the pair does not matter there.
        own = tl.where((base == 0)[:, None], tl.load(sink + channel, mask=inside, other=0.0)[None, :], own)
    if PAIRS > 0:
        second = (channel >= PAIRS) & (channel < 2 * PAIRS)
        paired = inside & (channel < 2 * PAIRS)
        pair = tl.where(second, channel - PAIRS, channel)
        other = tl.load(mean + tl.where(second, channel - PAIRS, channel + PAIRS), mask=paired, other=0.0)
        other = tl.where(second, other, -other)
        frequency = tl.load(frequencies + pair, mask=paired, other=0.0)
        cos, sin = turned(base[:, None] * (frequency * 0.15915494309189535)[None, :])
        of_base = (own * cos + other[None, :] * sin) * rope_scale
        result = tl.where(paired[None, :], of_base, own)
    else:
        result = own
    return result
