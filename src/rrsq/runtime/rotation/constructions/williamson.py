"""Hadamard matrices of Williamson type, found by a search among sequences with a multiplier.

Four ±1 sequences of length n whose periodic autocorrelations cancel are looked for among those that a
multiplier ``t`` leaves alone: ``a_{t i mod n} = a_i``. Such a sequence is constant on the orbits of
multiplication by t, so a handful of signs describes it, and all pairs of pairs can be compared. With -1 among
the powers of t the sequences are symmetric and this is Williamson's method (J. Williamson, "Hadamard's
determinant theorem and the sum of four squares", Duke Math. J. 11 (1944)); otherwise they are supplementary
difference sets, for which the array of Goethals and Seidel needs no symmetry.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from rrsq.runtime.rotation.constructions.circulant import goethals_seidel

__all__ = ["is_williamson", "williamson", "williamson_sequences"]

# Length of the circulants -> multiplier. Length 43 has -1 = 7³, so its sequences are symmetric.
_MULTIPLIERS = {39: 5, 43: 7}


def is_williamson(order: int) -> bool:
    """Whether the search is known to succeed for this order: 156 and 172."""
    return order % 4 == 0 and order // 4 in _MULTIPLIERS


def williamson(order: int) -> Tensor:
    """Hadamard matrix int8 ``[order, order]`` from four circulants of order ``order / 4``."""
    n = order // 4
    sequences = williamson_sequences(n, _MULTIPLIERS[n])
    return goethals_seidel(torch.tensor(sequences, dtype=torch.int8))


def williamson_sequences(n: int, multiplier: int) -> list[list[int]]:
    """Find four ±1 sequences of length n, fixed by a multiplier, with ``Σ PAF(s) = 0`` for ``0 < s < n``.

    There are two to the number of the multiplier's orbits on the non-zero residues of candidates, and the
    search goes over all pairs of them in a fixed order.

    Raises:
        ValueError: there are no such sequences.
    """
    shifts = [orbit[0] for orbit in _orbits(n, (multiplier, -1)) if orbit[0]]
    candidates: dict[int, int] = {}  # signature -> a sequence that has it
    for sequence in _invariant_sequences(n, multiplier):
        candidates.setdefault(_signature(sequence, n, shifts), sequence)

    pairs: dict[int, tuple[int, int]] = {}
    for (first, a), (second, b) in product(candidates.items(), repeat=2):
        pairs.setdefault(first + second, (a, b))
        if -(first + second) in pairs:
            found = (a, b, *pairs[-(first + second)])
            return [[-1 if bits >> i & 1 else 1 for i in range(n)] for bits in found]
    raise ValueError(f"no four sequences of length {n} with multiplier {multiplier} have cancelling PAFs")


def _orbits(n: int, generators: tuple[int, ...]) -> list[list[int]]:
    """Orbits of the residues mod n under multiplication by the generators, each led by its smallest."""
    orbits: list[list[int]] = []
    reached: set[int] = set()
    for start in range(n):
        if start in reached:
            continue
        orbit = [start]
        for residue in orbit:  # grows while it is walked
            orbit += [image for g in generators if (image := residue * g % n) not in orbit]
        reached.update(orbit)
        orbits.append(orbit)
    return orbits


def _invariant_sequences(n: int, multiplier: int) -> list[int]:
    """All sequences constant on the multiplier's orbits with ``a_0 = 1``; bit i is set where ``a_i = -1``."""
    masks = [sum(1 << i for i in orbit) for orbit in _orbits(n, (multiplier,)) if orbit[0]]
    return [sum(chosen) for chosen in product(*((0, mask) for mask in masks))]


def _signature(sequence: int, n: int, shifts: list[int]) -> int:
    """The autocorrelations at these shifts as digits of one integer, so that signatures add as they do.

    ``PAF(s) = n - 2 · #{i : a_i ≠ a_{i+s}}``. The radix exceeds twice the largest sum of four (4n), so a sum
    of four signatures is zero only if every digit is.
    """
    signature = 0
    for shift in shifts:
        rotated = sequence >> shift | (sequence & ((1 << shift) - 1)) << (n - shift)
        signature = signature * (16 * n) + n - 2 * (sequence ^ rotated).bit_count()
    return signature
