"""How a rotation is factored for :mod:`.rotation_kernel`."""

from __future__ import annotations

import functools
from dataclasses import dataclass

__all__ = ["RotationShape", "rotation_shape"]

_SMALLEST_DOT = 16
_LARGEST_SINGLE_FAST = 64


@dataclass(frozen=True)
class RotationShape:
    """A token seen as ``[dense, fast]``; see :func:`.rotation_kernel.rotation_kernel`."""

    order: int
    base: int
    dense_power: int
    dense: int
    dense_padded: int
    dense_step: int
    fast: int
    fast_inner: int
    fast_outer: int
    warps: int


def _next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


@functools.lru_cache(maxsize=256)
def rotation_shape(channels: int, base: int, block: int, inner: int) -> RotationShape:
    """Factor a rotation of ``channels`` by Hadamard matrices of order ``block = base * 2^p`` over every ``inner``-th.

    The dense factor takes as much of the power of two as brings it to 16 rows, or leaves the fast factor what two
    products of up to 64 columns can do. With ``inner`` > 1 all of the mixing is dense.
    """
    power = block // base
    blocks = channels // (block * inner)
    if inner > 1:
        dense_power, fast, fast_inner, fast_outer = power, inner, 1, 1
    else:
        dense_power = 1
        while power // dense_power > _SMALLEST_DOT and (
            blocks * base * dense_power < _SMALLEST_DOT or power // dense_power > _LARGEST_SINGLE_FAST**2
        ):
            dense_power *= 2
        if base * dense_power * blocks < _LARGEST_SINGLE_FAST and power // dense_power == 2 * _LARGEST_SINGLE_FAST:
            dense_power *= 2
        fast = power // dense_power
        if fast < _SMALLEST_DOT:
            dense_power, fast, fast_inner, fast_outer = power, 1, 1, 1
        elif fast <= _LARGEST_SINGLE_FAST:
            fast_inner, fast_outer = fast, 1
        else:
            half = (fast.bit_length() - 1) // 2
            fast_outer = 1 << half
            fast_inner = fast // fast_outer
    dense = blocks * base * dense_power
    dense_padded = max(_next_power_of_two(dense), _SMALLEST_DOT)
    elements = dense_padded * fast
    warps = 4 if elements <= 4096 else 8 if elements <= 16384 else 16
    return RotationShape(
        order=block,
        base=base,
        dense_power=dense_power,
        dense=dense,
        dense_padded=dense_padded,
        dense_step=min(dense_padded, 64),
        fast=fast,
        fast_inner=fast_inner,
        fast_outer=fast_outer,
        warps=warps,
    )
