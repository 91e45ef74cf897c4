"""The online rotation before quantization, rounded so that every implementation gives the same bits.

Codes of 4 bits are chaotic: a value next to a rounding boundary that two kernels compute one unit in the last
place apart becomes another code, and some layers later every code is another. So the rotation in front of a
quantizer is defined to the bit. ``R = kron(dense, sylvester(fast))`` is applied as two products with ±1
matrices. The operand of each is taken to float16 relative to the largest magnitude of its row (a token in the
first product, ``fast`` channels in the second), by a power of two that puts this magnitude into [2^-9, 2^-8).
float16 then has no finer grid than 2^-24, and a sum of up to 256 such numbers fits into the 24 bits of
float32: it is exact in any order. What is lost is below 2^-12 of a value, or 2^-15 of its row's largest.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .hadamard import sylvester

__all__ = ["LARGEST_FACTOR", "RotationSplit", "dense_factor", "rotate_reproducibly", "split_rotation"]

LARGEST_FACTOR = 256
"""Largest side of a factor: sums of more numbers are not exact."""
_SMALLEST_FAST = 16
_SMALLEST_EXPONENT = 1 << 23
_LARGEST_EXPONENT = 244 << 23
_EXPONENTS = 245 << 23
_EXPONENT_BITS = 0x7F800000


@dataclass(frozen=True)
class RotationSplit:
    """A token seen as ``[dense, fast]``, and the two factors of its rotation."""

    base: int
    dense_power: int
    """The dense factor is ``kron(base matrix, sylvester(dense_power))``, block-diagonal over ``dense``."""
    dense: int
    fast: int
    mix_fast: bool
    """Whether the columns are mixed too."""


@functools.lru_cache(maxsize=256)
def split_rotation(channels: int, base: int, block: int, inner: int) -> RotationSplit:
    """Split a rotation of ``channels`` by Hadamard matrices of order ``block = base * 2^p`` over every
    ``inner``-th.

    How much of the power of two joins the dense factor is what makes the products smallest on tensor cores,
    whose tiles are powers of two. With ``inner`` > 1, or a power below 16, all of the mixing is dense.
    """
    power = block // base
    rows = channels // (power * inner)
    if inner > 1 or power < _SMALLEST_FAST:
        return RotationSplit(base, power, rows * power, inner, False)
    candidates = [1 << p for p in range(power.bit_length()) if power >> p >= _SMALLEST_FAST]

    def cost(dense_power: int) -> tuple[bool, int]:
        size = 1 << (rows * dense_power - 1).bit_length()
        fast = power // dense_power
        return max(size, fast) > LARGEST_FACTOR, size * fast * (size + fast)

    dense_power = min(candidates, key=cost)
    return RotationSplit(base, dense_power, rows * dense_power, power // dense_power, True)


def dense_factor(base: Tensor, split: RotationSplit) -> Tensor:
    """``kron(base, sylvester(dense_power))``, float32 on the device of ``base``."""
    return torch.kron(base.float(), sylvester(split.dense_power, torch.float32, base.device))


def rotate_reproducibly(x: Tensor, base: Tensor, block: int, inner: int) -> Tensor:
    """``x @ R`` with the roundings above.

    Args:
        x: ``[tokens, channels]``, floating point.
        base: ``[k, k]`` of ±1.
        block: order of the Hadamard matrices.
        inner: they mix every ``inner``-th channel.

    Returns:
        float32 ``[tokens, channels]``.
    """
    tokens, channels = x.shape
    split = split_rotation(channels, base.shape[0], block, inner)
    mixing = dense_factor(base, split)
    down, up = _to_half_range(x.float().abs().amax(1).view(tokens, 1, 1, 1))
    y = x.float().view(tokens, -1, mixing.shape[0], split.fast)
    y = torch.matmul(mixing.t(), (y * down).half().float())
    if split.mix_fast:
        down, row_up = _to_half_range(y.abs().amax(-1, keepdim=True))
        y = torch.matmul((y * down).half().float(), sylvester(split.fast, torch.float32, y.device))
        up = up * row_up
    return (y * (up * (1.0 / math.sqrt(block)))).view(tokens, channels)


def _to_half_range(largest: Tensor) -> tuple[Tensor, Tensor]:
    """Powers of two that take ``largest`` (float32 >= 0) into [2^-9, 2^-8), and back."""
    exponent = largest.contiguous().view(torch.int32) & _EXPONENT_BITS
    exponent = exponent.clamp(_SMALLEST_EXPONENT, _LARGEST_EXPONENT)
    return (_EXPONENTS - exponent).view(torch.float32), (exponent + (9 << 23)).view(torch.float32)
