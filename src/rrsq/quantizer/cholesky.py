"""Cholesky factorization, triangular inverse and permutations, in blocks: a Hessian is large."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cholesky_", "invert_lower_", "permuted", "reverse_"]

_BLOCK = 1024


def cholesky_(matrix: Tensor, block: int = _BLOCK) -> bool:
    """Overwrite a symmetric matrix ``[n, n]`` by its lower Cholesky factor, zeros above the diagonal.

    Returns:
        False if it is not positive definite; its contents are undefined then.
    """
    n = matrix.shape[0]
    for start in range(0, n, block):
        stop = min(start + block, n)
        corner = matrix[start:stop, start:stop]
        factor, info = torch.linalg.cholesky_ex(corner)
        if int(info) != 0:
            return False
        corner.copy_(factor)
        matrix[start:stop, stop:] = 0
        if stop < n:
            below = matrix[stop:, start:stop]
            below.copy_(torch.linalg.solve_triangular(factor.t(), below, upper=True, left=False))
            matrix[stop:, stop:].addmm_(below, below.t(), alpha=-1.0)
    return True


def invert_lower_(matrix: Tensor, block: int = _BLOCK) -> None:
    """Overwrite a lower triangular matrix ``[n, n]`` by its inverse."""
    n = matrix.shape[0]
    if n <= block:
        identity = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
        matrix.copy_(torch.linalg.solve_triangular(matrix, identity, upper=False))
        return
    half = n // 2
    upper, lower, below = matrix[:half, :half], matrix[half:, half:], matrix[half:, :half]
    invert_lower_(upper, block)
    invert_lower_(lower, block)
    # -lower @ below @ upper: the last rows and the first columns first, whose old values no other needs.
    for start in reversed(range(0, len(below), block)):
        stop = start + block
        below[start:stop] = lower[start:stop, :stop] @ below[:stop]
    for start in range(0, half, block):
        stop = start + block
        below[:, start:stop] = (below[:, start:] @ upper[start:, start:stop]).neg_()


def permuted(matrix: Tensor, order: Tensor, block: int = _BLOCK) -> Tensor:
    """Rows and columns of a square matrix ``[n, n]`` in another order, int64 ``[n]``; the matrix stays.

    One index of both on CUDA would make int64 matrices of its size first.
    """
    result = torch.empty_like(matrix)
    for start in range(0, len(order), block):
        rows = matrix.index_select(0, order[start : start + block])
        torch.index_select(rows, 1, order, out=result[start : start + block])
    return result


def reverse_(matrix: Tensor, block: int = _BLOCK) -> None:
    """Reverse the order of the rows and of the columns of a square matrix ``[n, n]``."""
    n = matrix.shape[0]
    for start in range(0, n // 2, block):
        stop = min(start + block, n // 2)
        first, last = matrix[start:stop], matrix[n - stop : n - start]
        kept = first.flip(0, 1)
        first.copy_(last.flip(0, 1))
        last.copy_(kept)
    if n % 2:
        matrix[n // 2] = matrix[n // 2].flip(0)
