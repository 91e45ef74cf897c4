"""Cached keys and values in 4 or 8 bits: how they are stored, for the operations that write and read them.

A cache holds codes ``[blocks, kv_heads, block_size, head_dim * bits / 8]`` with scales and minima ``[blocks,
kv_heads, block_size, groups]``: :class:`CachePages`. Without a block table there is one block a sequence, and
``block_size`` is its capacity; with one (int32 ``[batch, blocks of a sequence]``) token ``n`` lies in block
``table[b, n // block_size]``, row ``n % block_size``, as in vLLM.

Keys are stored after RoPE. What is stored is ``(k - RoPE_p(mu)) H``: a calibrated offset ``mu``, which was
found before RoPE and is rotated to the key's position ``p``, is taken off, and a Hadamard matrix applied.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._triton import tl, triton
from .codes import code_max

__all__ = [
    "CachePages",
    "angles",
    "decode_cache",
    "dequantized_halves",
    "encode_cache",
    "offset_keys",
    "page_shapes",
]

_HALF_MAX = torch.finfo(torch.float16).max
_HALF_TINY = 2.0**-24


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


def page_shapes(head_dim: int, bits: int, group_size: int) -> tuple[int, int]:
    """Bytes of codes and number of scales of one token and head."""
    return head_dim * bits // 8, head_dim // group_size


def encode_cache(
    x: Tensor, bits: int, group_size: int, zero_point: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize along the last dimension in groups.

    Symmetric: codes of ±code_max whose outermost rounding cells end at the largest magnitude. With a zero
    point: ``2**bits`` levels from the group's minimum to its maximum. The scale is rounded to float16 first,
    so that what is stored is what was used.

    Args:
        x: ``[..., head_dim]`` floating point.
        bits: 4 (two codes a byte: entry ``j`` low, ``j + head_dim/2`` high) or 8.
        group_size: divides ``head_dim``.
        zero_point: store the group's minimum too.

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
    offset: Tensor, positions: Tensor, frequencies: Tensor | None, scale: float
) -> Tensor:
    """RoPE of the keys' offset, float32 ``[batch, kv_heads, tokens, head_dim]``.

    Args:
        offset: float32 ``[kv_heads, head_dim]``.
        positions: int ``[batch, tokens]``.
        frequencies: float64 ``[rotary / 2]``, of the pairs ``(j, j + rotary / 2)``; channels beyond
            ``rotary`` stay. None: no RoPE.
        scale: of cosines and sines (scaled RoPE).
    """
    batch, tokens = positions.shape
    whole = offset[None, :, None, :]
    if frequencies is None:
        return whole.expand(batch, -1, tokens, -1)
    cos, sin = (x.unsqueeze(1) for x in angles(positions, frequencies, scale))
    half = frequencies.shape[0]
    first, second, rest = whole.split((half, half, offset.shape[1] - 2 * half), dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*turned, rest.expand(*turned[0].shape[:-1], -1)), dim=-1)


@triton.jit
def _dequantized(
    code,
    scale_pointer,
    minimum_pointer,
    rows,
    valid,
    first,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    MINIMUM: tl.constexpr,
):
    """float16 of one half of the channels, codes int16 ``[ROWS, PADDED]``; ``first``: its first channel.

    The code is put into the mantissa of 1024, which a conversion of integers would take four times as long
    for; codes, and their product with a scale up to one rounding, are exact in float16.
    """
    number = (code | 0x6400).to(tl.float16, bitcast=True)
    if MINIMUM:
        number = number - 1024.0
    else:
        number = number - (1024.0 + 2 ** (BITS - 1))
    if GROUPS == 1:
        scale = tl.load(scale_pointer + rows, mask=valid, other=0.0)
        number = number * scale[:, None]
        if MINIMUM:
            number = number + tl.load(minimum_pointer + rows, mask=valid, other=0.0)[:, None]
    elif HALF == PADDED and HALF % GROUP == 0:
        group = first // GROUP + tl.arange(0, PADDED // GROUP)
        place = rows[:, None] + group[None, :]
        number = number.reshape(ROWS, PADDED // GROUP, GROUP)
        scale = tl.load(scale_pointer + place, mask=valid[:, None], other=0.0)
        number = number * scale[:, :, None]
        if MINIMUM:
            minimum = tl.load(minimum_pointer + place, mask=valid[:, None], other=0.0)
            number = number + minimum[:, :, None]
        number = number.reshape(ROWS, PADDED)
    else:
        channel = tl.arange(0, PADDED)
        place = rows[:, None] + ((first + channel) // GROUP)[None, :]
        inside = valid[:, None] & (channel < HALF)[None, :]
        number = number * tl.load(scale_pointer + place, mask=inside, other=0.0)
        if MINIMUM:
            number = number + tl.load(minimum_pointer + place, mask=inside, other=0.0)
    return number


@triton.jit
def dequantized_halves(
    codes_pointer,
    scale_pointer,
    minimum_pointer,
    code_rows,
    scale_rows,
    valid,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    MINIMUM: tl.constexpr,
):
    """The lower and the upper half of the channels of ``ROWS`` cached tokens, float16 ``[ROWS, PADDED]`` each.

    ``code_rows``, ``scale_rows``: where each token's codes and scales begin. What is not ``valid`` and what
    lies beyond ``HALF`` channels is finite (zero codes, zero scale).
    """
    channel = tl.arange(0, PADDED)
    inside = valid[:, None] & (channel < HALF)[None, :]
    place = code_rows[:, None] + channel[None, :]
    if BITS == 4:
        pair = tl.load(codes_pointer + place, mask=inside, other=0).to(tl.int16)
        low = pair & 0xF
        high = (pair >> 4) & 0xF
    else:
        low = tl.load(codes_pointer + place, mask=inside, other=0).to(tl.int16)
        high = tl.load(codes_pointer + place + HALF, mask=inside, other=0).to(tl.int16)
    first = _dequantized(
        low, scale_pointer, minimum_pointer, scale_rows, valid, 0,
        BITS, GROUPS, GROUP, HALF, ROWS, PADDED, MINIMUM,
    )  # fmt: skip
    second = _dequantized(
        high, scale_pointer, minimum_pointer, scale_rows, valid, HALF,
        BITS, GROUPS, GROUP, HALF, ROWS, PADDED, MINIMUM,
    )  # fmt: skip
    return first, second


@triton.jit
def turn(base, frequency):
    """Cosine and sine, float32, of ``base * frequency`` (float64), brought near zero first."""
    turns = base * frequency * 0.15915494309189535
    angle = ((turns - tl.floor(turns)) * 6.283185307179586).to(tl.float32)
    return tl.cos(angle), tl.sin(angle)
