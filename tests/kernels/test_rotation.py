"""The online rotation: exact to rounding, or to the bit in front of a quantizer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rrsq import kernels
from rrsq.kernels.rotation import (
    LARGEST_FACTOR,
    rotate_reproducibly,
    rotation_shape,
    split_rotation,
    sylvester,
)
from rrsq.runtime.rotation.hadamard import (
    HadamardPlan,
    base_matrix,
    hadamard_matrix,
    orthonormal,
    plan_hadamard,
)

from .problems import ROTATIONS, activations, both, hadamard_12, needs_triton

hadamard_transform = kernels.hadamard_transform.reference


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
    y = hadamard_transform(x, hadamard_matrix(base).float(), heads, head_dim)
    np.testing.assert_allclose(y.numpy(), expected, atol=1e-12)


def test_rotation_across_heads_is_a_rotation_with_an_inner_stride():
    x = torch.randn(3, 4 * 32, dtype=torch.float64)
    base = torch.ones(1, 1)
    with kernels.use_kernels("eager"):
        actual = kernels.hadamard_transform(x, base, 4, inner=32)
        across = kernels.hadamard_transform(x.view(3, 4, 32).mT.contiguous(), base, 4).mT.reshape(3, 128)
    torch.testing.assert_close(actual, across)
    torch.testing.assert_close(actual.norm(dim=1), x.norm(dim=1))


@needs_triton
@pytest.mark.parametrize(("channels", "name", "block", "inner"), ROTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_hadamard_transform_against_float64(channels, name, block, inner, dtype, device):
    base = hadamard_12() if name == "paley" else torch.ones(1, 1)
    x = activations(3, channels, "huge_channel", dtype, device)
    k = base.shape[0]
    H = torch.kron(base.double(), sylvester(block // k, torch.float64, "cpu")) / math.sqrt(block)
    R = torch.kron(torch.eye(channels // (block * inner)).double(), torch.kron(H, torch.eye(inner).double()))
    expected = x.double().cpu() @ R
    # Of 16-bit activations the kernel keeps 11 bits in between; their own rounding is of 8.
    tolerance = 5e-6 if dtype is torch.float32 else 2.0**-9
    for actual in both(kernels.hadamard_transform, x, base.to(device), block, inner):
        assert actual.dtype is torch.float32
        error = (actual.double().cpu() - expected).abs().amax(1) / expected.abs().amax(1)
        assert float(error.max()) < tolerance


SIZES = [8, 12, 64, 576, 1536, 4096, 4864, 8960, 11008, 14336, 18944, 28672]


def hard_activations(tokens: int, channels: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(channels))
    x[0, 3] = 3e4
    x[1] *= 1e-30
    x[2] = 0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("block", "inner"), [(64, 1), (48, 1), (16, 4), (12, 16), (192, 1)])
def test_it_is_the_rotation(block: int, inner: int, dtype: torch.dtype) -> None:
    x = hard_activations(4, 192, dtype)
    plan = HadamardPlan(block, block, 1 if block & (block - 1) == 0 else 12)
    one = torch.kron(orthonormal(plan, torch.float64), torch.eye(inner).double())
    R = torch.block_diag(*[one] * (192 // (block * inner)))
    expected = x.double() @ R
    actual = rotate_reproducibly(x, base_matrix(plan), block, inner).double()
    error = (actual - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-300)
    assert float(error.max()) < 2.0**-11
    assert torch.equal(actual[2], torch.zeros_like(actual[2]))


@pytest.mark.parametrize("channels", SIZES)
def test_sums_are_exact_in_any_order(channels: int) -> None:
    """The same roundings with sums in float64 give the same bits."""
    plan = plan_hadamard(channels)
    x = hard_activations(3, channels, torch.bfloat16)
    base = base_matrix(plan)
    split = split_rotation(channels, plan.base, plan.block, 1)
    assert not split.mix_fast or max(split.fast, split.base * split.dense_power) <= LARGEST_FACTOR

    def rounded(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        exponent = torch.frexp(rows.abs().amax(-1, keepdim=True))[1].clamp_min(-125)
        unit = torch.ldexp(torch.ones_like(exponent).double(), exponent + 8)
        return (rows / unit).half().double(), unit

    mixing = torch.kron(base.double(), sylvester(split.dense_power, torch.float64, "cpu"))
    y, unit = rounded(x.double())
    y = mixing.t() @ y.view(3, -1, mixing.shape[0], split.fast)
    unit = unit.view(3, 1, 1, 1)
    if split.mix_fast:
        y, row_unit = rounded(y)
        y = y @ sylvester(split.fast, torch.float64, "cpu")
        unit = unit * row_unit
    scale = (unit / plan.block**0.5).float()
    expected = (y.float() * scale).reshape(3, channels)
    assert torch.equal(rotate_reproducibly(x, base, plan.block, 1), expected)


@pytest.mark.parametrize(
    ("channels", "base", "block", "inner"),
    [(14336, 28, 14336, 1), (11008, 172, 11008, 1), (4096, 1, 128, 1), (4096, 1, 32, 128), (64, 1, 64, 1)],
)
def test_rotation_factors_multiply_to_the_token(channels, base, block, inner):
    shape = rotation_shape(channels, base, block, inner)
    split = shape.split
    assert split.dense * split.fast == channels
    assert split.dense <= shape.dense_padded <= LARGEST_FACTOR
    assert split.base * split.dense_power * (split.fast if split.mix_fast else 1) == block
