"""How a split rotation runs on a GPU: padding, steps and occupancy of :mod:`.rotation_kernel`."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TypedDict

from ..eager.rotation import RotationSplit, split_rotation

__all__ = ["RotationShape", "rotation_shape"]

_LARGEST_WHOLE = 128
_DENSE_STEP = 64
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

    split: RotationSplit
    dense_padded: int
    """The next power of two, at least 16."""
    dense_step: int
    """Rows of the dense factor taken at a time."""
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


@functools.lru_cache(maxsize=256)
def rotation_shape(channels: int, base: int, block: int, inner: int) -> RotationShape:
    """How a rotation of ``channels`` by Hadamard matrices of order ``block`` over every ``inner``-th runs."""
    split = split_rotation(channels, base, block, inner)
    padded = max(1 << (split.dense - 1).bit_length(), _SMALLEST_DOT)
    whole = padded <= _LARGEST_WHOLE
    return RotationShape(
        split=split,
        dense_padded=padded,
        dense_step=padded if whole else _DENSE_STEP,
        **_occupancy(padded * split.fast, whole),
    )
