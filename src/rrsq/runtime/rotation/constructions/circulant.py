"""Hadamard matrices from four circulants whose autocorrelations cancel.

With ``PAF(s) = Σ_i a_i a_{(i + s) mod n}`` the periodic autocorrelation, four ±1 sequences ``a, b, c, d`` of
length n with ``Σ PAF(s) = 0`` for every shift ``0 < s < n`` give circulants with
``A Aᵀ + B Bᵀ + C Cᵀ + D Dᵀ = 4n I``.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["circulant", "goethals_seidel"]


def circulant(row: Tensor) -> Tensor:
    """Circulant matrix ``[n, n]`` of a first row ``[n]``: ``[i, j] = row[(j - i) mod n]``."""
    index = torch.arange(len(row))
    return row[(index[None, :] - index[:, None]) % len(row)]


def goethals_seidel(rows: Tensor) -> Tensor:
    """Hadamard matrix int8 ``[4n, 4n]`` from the first rows of four circulants, ``[4, n]`` of ±1.

    J.-M. Goethals and J. J. Seidel, "A skew Hadamard matrix of order 36", J. Austral. Math. Soc. 11 (1970):
    with R the reversal of columns::

         A    BR    CR    DR
        -BR   A    DᵀR  -CᵀR
        -CR  -DᵀR   A    BᵀR
        -DR   CᵀR  -BᵀR   A

    Williamson's array is the case of symmetric circulants, where R can be left out.
    """
    A, B, C, D = (circulant(row.to(torch.int8)) for row in rows)
    BR, CR, DR = B.flip(1), C.flip(1), D.flip(1)
    BtR, CtR, DtR = B.T.flip(1), C.T.flip(1), D.T.flip(1)
    array = (
        (A, BR, CR, DR),
        (-BR, A, DtR, -CtR),
        (-CR, -DtR, A, BtR),
        (-DR, CtR, -BtR, A),
    )
    return torch.cat([torch.cat(blocks, dim=1) for blocks in array], dim=0)
