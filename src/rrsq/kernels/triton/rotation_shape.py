"""How a rotation is factored for :mod:`.rotation_kernel`."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TypedDict

__all__ = ["LARGEST_DENSE", "RotationShape", "rotation_shape"]

LARGEST_DENSE = 256
_LARGEST_WHOLE = 128
_DENSE_STEP = 64
_LARGEST_FAST = 256
_SMALLEST_DOT = 16
_SMALL_TOKEN = 8192


class _Occupancy(TypedDict):
    warps: int
    programs: int
    registers: int | None
    stages: int


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
    mix_fast: bool
    warps: int
    programs: int
    """Programs a multiprocessor holds at a time."""
    registers: int | None
    """Registers a thread is held to, so that they fit; None: no limit."""
    stages: int
    """Tokens on their way to shared memory."""


def _occupancy(elements: int, whole: bool) -> _Occupancy:
    """What was fastest on an H200, by the size of a token and whether the dense factor is read at once."""
    if elements <= _SMALL_TOKEN:
        return _Occupancy(warps=4, programs=4, registers=None, stages=3)
    if elements <= 2 * _SMALL_TOKEN:
        if whole:
            return _Occupancy(warps=8, programs=2, registers=128, stages=1)
        return _Occupancy(warps=4, programs=4, registers=None, stages=2)
    if whole:
        return _Occupancy(warps=16, programs=1, registers=None, stages=1)
    return _Occupancy(warps=8, programs=1, registers=None, stages=3)


def _padded(n: int) -> int:
    return max(1 << (n - 1).bit_length(), _SMALLEST_DOT)


@functools.lru_cache(maxsize=256)
def rotation_shape(channels: int, base: int, block: int, inner: int) -> RotationShape:
    """Factor a rotation of ``channels`` by Hadamard matrices of order ``block = base * 2^p`` over every
    ``inner``-th.

    How much of the power of two joins the dense factor is what makes the products smallest. With ``inner`` >
    1 all of the mixing is dense.
    """
    power = block // base
    rows = channels // (power * inner)
    if inner > 1:
        dense_power, fast = power, inner
    else:
        best = None
        dense_power = 1
        while power // dense_power >= _SMALLEST_DOT:
            size, columns = _padded(rows * dense_power), power // dense_power
            cost = size * columns * (size + columns)
            if size <= LARGEST_DENSE and columns <= _LARGEST_FAST and (best is None or cost < best[0]):
                best = cost, dense_power
            dense_power *= 2
        if best is None:
            raise ValueError(
                f"no factors for a rotation of {channels} channels in blocks of {block} = {base} * {power}"
            )
        dense_power = best[1]
        fast = power // dense_power
    dense = rows * dense_power
    padded = _padded(dense)
    whole = padded <= _LARGEST_WHOLE
    return RotationShape(
        order=block,
        base=base,
        dense_power=dense_power,
        dense=dense,
        dense_padded=padded,
        dense_step=padded if whole else _DENSE_STEP,
        fast=fast,
        mix_fast=inner == 1,
        **_occupancy(padded * fast, whole),
    )
