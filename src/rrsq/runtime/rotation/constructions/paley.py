"""Hadamard matrices from the quadratic character of a finite field.

R. E. A. C. Paley, "On orthogonal matrices", J. Math. Phys. 12 (1933). With χ the quadratic character of
GF(q) and ``Q_ij = χ(a_i - a_j)`` the Jacobsthal matrix, ``Q Qᵀ = qI - J``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rrsq.runtime.rotation.constructions.fields import finite_field, prime_power

__all__ = ["is_paley_one", "is_paley_two", "jacobsthal", "paley_one", "paley_two"]


def is_paley_one(order: int) -> bool:
    """Whether ``order = q + 1`` with a prime power ``q ≡ 3 (mod 4)``."""
    return order % 4 == 0 and prime_power(order - 1) is not None


def is_paley_two(order: int) -> bool:
    """Whether ``order = 2 (q + 1)`` with a prime power ``q ≡ 1 (mod 4)``."""
    return order % 8 == 4 and prime_power(order // 2 - 1) is not None


def jacobsthal(q: int) -> Tensor:
    """Jacobsthal matrix of GF(q): int8 ``[q, q]``, ``[i, j] = χ(a_i - a_j)``, zero on the diagonal."""
    field = finite_field(q)
    return field.quadratic_character()[field.differences()]


def paley_one(order: int) -> Tensor:
    """Paley's first construction: ``H = I + S`` with ``S = [[0, 1ᵀ], [-1, Q]]``, int8 ``[q + 1, q + 1]``.

    ``S`` is skew because -1 is no square in GF(q) for ``q ≡ 3 (mod 4)``, and ``S Sᵀ = qI``.
    """
    S = _bordered(order - 1, left=-1)
    return S + torch.eye(order, dtype=torch.int8)


def paley_two(order: int) -> Tensor:
    """Paley's second construction: ``H = C ⊗ [[1, 1], [1, -1]] + I ⊗ [[1, -1], [-1, -1]]``, int8.

    ``C = [[0, 1ᵀ], [1, Q]]`` of order ``q + 1 = order / 2`` is symmetric because -1 is a square in GF(q) for
    ``q ≡ 1 (mod 4)``, and ``C Cᵀ = qI``.
    """
    C = _bordered(order // 2 - 1, left=1)
    sum_part = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    unit_part = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(C, sum_part) + torch.kron(torch.eye(order // 2, dtype=torch.int8), unit_part)


def _bordered(q: int, left: int) -> Tensor:
    """``[[0, 1ᵀ], [left, Q]]``."""
    S = torch.zeros(q + 1, q + 1, dtype=torch.int8)
    S[0, 1:] = 1
    S[1:, 0] = left
    S[1:, 1:] = jacobsthal(q)
    return S
