"""Hadamard matrices of order 4(3n - 1) from Turyn-type sequences.

Turyn-type sequences TT(n) are ±1 sequences X, Y, Z of length n and W of length n - 1 whose aperiodic
autocorrelations ``N(s) = Σ_i a_i a_{i+s}`` satisfy ``N_X + N_Y + 2 N_Z + 2 N_W = 0`` for every ``s > 0``
(R. J. Turyn, "Hadamard matrices, Baumert-Hall units, four-symbol sequences, pulse compression, and surface
wave encodings", J. Combin. Theory A 16 (1974)). They reach circulants of order 47 and 59, where Williamson's
symmetric ones do not exist (Holzmann, Kharaghani, Tayfeh-Rezaie, Des. Codes Cryptogr. 46 (2008)).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rrsq.runtime.rotation.constructions.circulant import goethals_seidel

__all__ = ["is_turyn", "turyn", "turyn_type"]

# n -> (X, Y, Z, W), bit i set where element i is -1; the first hit of a search that matches the
# autocorrelations of pairs (X, Y) with those of pairs (Z, W). It takes seconds, so its result is kept.
_TURYN_TYPE = {
    8: (0x80, 0x4D, 0x1A, 0x23),
    10: (0x009, 0x216, 0x1B8, 0x114),
    16: (0x0559, 0x2663, 0x520C, 0x7829),
    20: (0xA1011, 0x62A2C, 0x84F2E, 0x2DC83),
}


def is_turyn(order: int) -> bool:
    """Whether sequences for this order are at hand: 92, 116, 188 and 236."""
    return order in {4 * (3 * n - 1) for n in _TURYN_TYPE}


def turyn(order: int) -> Tensor:
    """Hadamard matrix int8 ``[order, order]`` with ``order = 4 (3n - 1)`` from TT(n).

    The four concatenations (Z, W, X), (Z, W, -X), (Z, -W, Y) and (Z, -W, -Y) of length 3n - 1 have
    autocorrelations that sum to ``2 (N_X + N_Y + 2 N_Z + 2 N_W) = 0``: in ``N_(P,Q) + N_(P,-Q)`` the terms
    across the seam cancel. They are the circulants of the Goethals-Seidel array.
    """
    X, Y, Z, W = turyn_type((order // 4 + 1) // 3)
    rows = [(Z, W, X), (Z, W, -X), (Z, -W, Y), (Z, -W, -Y)]
    return goethals_seidel(torch.stack([torch.cat(parts) for parts in rows]))


def turyn_type(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sequences X, Y, Z, W of TT(n): int8 ``[n]``, ``[n]``, ``[n]`` and ``[n - 1]`` of ±1."""
    X, Y, Z, W = _TURYN_TYPE[n]
    return _expand(X, n), _expand(Y, n), _expand(Z, n), _expand(W, n - 1)


def _expand(bits: int, length: int) -> Tensor:
    return torch.tensor([-1 if bits >> i & 1 else 1 for i in range(length)], dtype=torch.int8)
