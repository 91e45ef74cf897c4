"""Factorization and inverse in place against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rrsq.quantizer.cholesky import cholesky_, invert_lower_, permuted, reverse_


def positive(n: int) -> Tensor:
    x = torch.randn(2 * n, n, generator=torch.Generator().manual_seed(n))
    return x.T @ x


@pytest.mark.parametrize(("n", "block"), [(1, 4), (4, 4), (37, 8), (64, 16)])
def test_the_factor_is_that_of_numpy(n: int, block: int) -> None:
    matrix = positive(n)
    expected = np.linalg.cholesky(matrix.double().numpy())
    assert cholesky_(matrix, block)
    np.testing.assert_allclose(matrix.numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("n", "block"), [(1, 4), (5, 2), (37, 8)])
def test_the_inverse_is_that_of_numpy(n: int, block: int) -> None:
    lower = torch.linalg.cholesky(positive(n))
    expected = np.linalg.inv(lower.double().numpy())
    invert_lower_(lower, block)
    np.testing.assert_allclose(lower.numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("row", [3, 30])
def test_a_matrix_that_is_not_positive_definite_is_told(row: int) -> None:
    matrix = positive(37)
    matrix[row, row] = -1.0
    assert not cholesky_(matrix, 8)


@pytest.mark.parametrize(("n", "block"), [(1, 2), (7, 3), (7, 64)])
def test_another_order(n: int, block: int) -> None:
    matrix = torch.arange(n * n, dtype=torch.float32).view(n, n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    expected = matrix.numpy()[np.ix_(order.numpy(), order.numpy())]
    assert (permuted(matrix, order, block).numpy() == expected).all()


@pytest.mark.parametrize(("n", "block"), [(1, 2), (6, 2), (7, 2), (7, 64)])
def test_reversing(n: int, block: int) -> None:
    matrix = torch.arange(n * n, dtype=torch.float32).view(n, n)
    expected = matrix.numpy()[::-1, ::-1].copy()
    reverse_(matrix, block)
    assert (matrix.numpy() == expected).all()
