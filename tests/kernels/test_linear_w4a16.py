"""The product with 16-bit activations: the reference against float64, the kernel against the reference."""

from __future__ import annotations

import pytest
import torch

from rrsq import kernels

from .problems import (
    Weight,
    added,
    assert_close,
    both,
    make_problem,
    needs_triton,
    random_bias,
)

linear_w4a16 = kernels.linear_w4a16.reference


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float64, 1e-7)]
)
def test_against_float64(dtype: torch.dtype, tolerance: float, grouped: bool, has_bias: bool) -> None:
    weight, bias = Weight(96, grouped), random_bias(has_bias)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = linear_w4a16(x, weight.packed, weight.scale, weight.multiplier, bias)
    assert y.dtype == dtype
    assert_close(y, added(x.double().numpy() @ weight.dense.T, bias), tolerance)


@needs_triton
@pytest.mark.parametrize("bias", [False, True])
def test_the_kernel(bias, device):
    problem = make_problem(3, 40, 192, bias=bias, device=device)
    x = torch.randn(3, 192, device=device)
    arguments = (x, problem.packed, problem.weight_scale, problem.multiplier, problem.bias)
    actual, expected = both(kernels.linear_w4a16, *arguments)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
