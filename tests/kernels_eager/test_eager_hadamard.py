"""The online rotation against the dense Kronecker product in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rrsq.kernels import reference
from rrsq.kernels.eager.hadamard import hadamard_transform, sylvester
from rrsq.runtime.rotation.hadamard import hadamard_matrix


def sylvester_by_bits(order: int) -> np.ndarray:
    """``(-1)**popcount(i & j)``."""
    return np.array([[(-1.0) ** bin(i & j).count("1") for j in range(order)] for i in range(order)])


def dense(base: int, block: int) -> np.ndarray:
    factor = hadamard_matrix(base).double().numpy()
    return np.kron(factor, sylvester_by_bits(block // base)) / np.sqrt(block)


@pytest.mark.parametrize("order", [1, 2, 8, 32])
def test_sylvester(order: int) -> None:
    assert (sylvester(order, torch.float64, "cpu").numpy() == sylvester_by_bits(order)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("base", "block", "blocks"), [(1, 1, 3), (1, 2, 1), (1, 64, 3), (12, 12, 2), (12, 48, 2), (28, 56, 1)]
)
def test_blocks_are_multiplied_by_the_dense_matrix(
    base: int, block: int, blocks: int, dtype: torch.dtype
) -> None:
    x = torch.randn(2, 3, block * blocks, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = x.numpy() @ np.kron(np.eye(blocks), dense(base, block))
    y = hadamard_transform(x.to(dtype), hadamard_matrix(base).float(), block)
    assert y.dtype == dtype
    assert y.shape == x.shape
    np.testing.assert_allclose(y.numpy(), expected, atol=1e-12 if dtype == torch.float64 else 3e-6)


def test_a_sylvester_factor_larger_than_one_dense_step() -> None:
    x = torch.randn(4, 1024, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    H = np.array([[1.0]])
    while len(H) < 1024:
        H = np.block([[H, H], [H, -H]])
    y = hadamard_transform(x, torch.ones(1, 1), 1024)
    np.testing.assert_allclose(y.numpy(), x.numpy() @ H / 32, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_comes_back_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    base = hadamard_matrix(12).float()
    assert torch.equal(hadamard_transform(x, base, 24), hadamard_transform(x.float(), base, 24))


@pytest.mark.parametrize(("heads", "head_dim", "base"), [(4, 16, 1), (12, 8, 12), (2, 3, 1)])
def test_across_heads_is_the_kronecker_product_with_the_identity(
    heads: int, head_dim: int, base: int
) -> None:
    x = torch.randn(5, heads * head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = x.numpy() @ np.kron(dense(base, heads), np.eye(head_dim))
    y = reference.hadamard_transform(x, hadamard_matrix(base).float(), heads, head_dim)
    np.testing.assert_allclose(y.numpy(), expected, atol=1e-12)
