"""Hadamard matrices of any order we can construct, and the plan by which a size is rotated.

A size is rotated in blocks by ``R = I ⊗ (base ⊗ sylvester) / sqrt(block)``: a Hadamard matrix of a small
order ``base`` and Sylvester's doubling for the rest. Applying it costs ``base + log2(block / base)``
additions a channel, so the smallest base is the cheapest (QuaRot, arXiv 2404.00456, section 4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from rrsq.errors import HadamardOrderError
from rrsq.kernels.rotation import hadamard_transform, sylvester
from rrsq.runtime.rotation.constructions import CONSTRUCTIONS, find_construction

__all__ = [
    "MAX_BASE",
    "HadamardPlan",
    "base_matrix",
    "hadamard_matrix",
    "is_known_order",
    "orthonormal",
    "plan_hadamard",
    "rotate_columns",
]

MAX_BASE = 256


@dataclass(frozen=True)
class HadamardPlan:
    """How a dimension is rotated: ``size / block`` equal diagonal blocks, each ``base ⊗ sylvester(power)``.

    Attributes:
        size: channels of the dimension.
        block: channels that are mixed with each other; divides ``size``. 1 means no rotation.
        base: order of the dense Hadamard factor; ``block / base`` is a power of two.

    Raises:
        HadamardOrderError: the numbers do not fit together, or no matrix of order ``base`` is known.
    """

    size: int
    block: int
    base: int

    def __post_init__(self) -> None:
        if min(self.size, self.block, self.base) < 1:
            raise HadamardOrderError(f"{self} has a number below 1: size, block and base are positive")
        if self.size % self.block or self.block % self.base or not _is_power_of_two(self.power):
            raise HadamardOrderError(
                f"{self} does not fit together: block must divide size, and block / base be a power of two"
            )
        if not is_known_order(self.base):
            raise HadamardOrderError(_unknown(self.base))

    @property
    def power(self) -> int:
        """Order of the Sylvester factor, ``block / base``: a power of two."""
        return self.block // self.base

    @property
    def is_full(self) -> bool:
        """Whether one block mixes all channels."""
        return self.block == self.size


def is_known_order(order: int) -> bool:
    """Whether :func:`hadamard_matrix` can build this order. Builds nothing."""
    return _smallest_base(order) is not None


def hadamard_matrix(order: int) -> Tensor:
    """Build a Hadamard matrix: int8 ``[order, order]`` of ±1 with ``H Hᵀ = order · I``.

    ``H = base ⊗ sylvester(order / base)`` with the smallest base that one of
    :data:`.constructions.CONSTRUCTIONS` reaches. The same order gives the same matrix always.

    Raises:
        HadamardOrderError: no construction reaches the order.
    """
    base = _smallest_base(order)
    if base is None:
        raise HadamardOrderError(_unknown(order))
    return torch.kron(_build_base(base), sylvester(order // base, torch.int8, "cpu"))


def plan_hadamard(size: int, *, shards: int = 1, max_base: int = MAX_BASE) -> HadamardPlan:
    """Choose the block and the base by which a dimension is rotated.

    The block is the largest divisor of ``size / shards`` of the form ``base · 2^p`` with a known order
    ``base <= max_base``; among the bases that give this block, the smallest. So 14336 = 28 · 512 and
    11008 = 172 · 64 are rotated in full, while 29568 = 924 · 32 falls back to 7 blocks of 4224 = 132 · 32. An
    odd size has no block but 1, which is no rotation.

    Args:
        size: channels of the dimension.
        shards: parts in which tensor parallelism cuts the dimension; no block crosses a cut.
        max_base: largest order of the dense factor, which is what the online rotation pays for.

    Raises:
        HadamardOrderError: ``shards`` does not divide ``size``, or a number is below 1.
    """
    if min(size, shards, max_base) < 1:
        raise HadamardOrderError(
            f"cannot plan size={size}, shards={shards}, max_base={max_base}: all must be at least 1"
        )
    if size % shards:
        raise HadamardOrderError(
            f"cannot cut {size} channels into {shards} shards: choose a number of shards that divides {size}"
        )
    part = size // shards
    for block in _divisors_descending(part):
        base = _smallest_base(block)
        if base is not None and base <= max_base:
            return HadamardPlan(size, block, base)
    raise AssertionError("unreachable: 1 divides every size and is a known order")


def base_matrix(plan: HadamardPlan) -> Tensor:
    """The plan's dense factor: float32 ``[base, base]`` of ±1."""
    return hadamard_matrix(plan.base).to(torch.float32)


def orthonormal(plan: HadamardPlan, dtype: torch.dtype) -> Tensor:
    """The whole rotation as a dense ``[size, size]`` matrix, for small sizes.

    ``R = I ⊗ (base ⊗ sylvester) / sqrt(block)``, block-diagonal unless the plan is full.
    """
    scaled = hadamard_matrix(plan.block).to(torch.float64) / math.sqrt(plan.block)
    return torch.kron(torch.eye(plan.size // plan.block, dtype=torch.float64), scaled).to(dtype)


def rotate_columns(W: Tensor, plan: HadamardPlan) -> Tensor:
    """``W R`` for ``W`` of shape ``[..., size]``, by the factors of ``R``: never ``[size, size]`` in memory.

    Returns:
        A tensor of the same shape and device, float64 for float64 input and float32 for anything lower.

    Raises:
        HadamardOrderError: ``W`` does not have ``size`` columns.
    """
    if W.shape[-1] != plan.size:
        raise HadamardOrderError(
            f"cannot rotate {W.shape[-1]} columns by {plan}: make the plan for this tensor's last dimension"
        )
    return hadamard_transform.reference(W, base_matrix(plan).to(W.device), plan.block)


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


@lru_cache(maxsize=4096)
def _smallest_base(order: int) -> int | None:
    """Smallest known ``base`` with ``order / base`` a power of two and ``base`` not a doubling itself."""
    if order < 1:
        return None
    base = order // (order & -order)
    while base <= order:
        if base == 1 or (base % 4 == 0 and find_construction(base) is not None):
            return base
        base *= 2
    return None


@lru_cache(maxsize=64)
def _build_base(order: int) -> Tensor:
    """The matrix of a smallest base, shared between callers: not to be written to."""
    construction = find_construction(order)
    return sylvester(order, torch.int8, "cpu") if construction is None else construction.build(order)


def _divisors_descending(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)}, reverse=True)


def _unknown(order: int) -> str:
    if order < 1 or (order > 2 and order % 4):
        return f"there is no Hadamard matrix of order {order}: orders are 1, 2 and the multiples of 4"
    names = ", ".join(c.name for c in CONSTRUCTIONS)
    return (
        f"no construction for a Hadamard matrix of order {order} (tried doubling, {names}): "
        "rotate in blocks of a known order instead, as plan_hadamard does"
    )
