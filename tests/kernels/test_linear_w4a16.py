"""The product with 16-bit activations: the reference against float64, the kernel against the reference."""

from __future__ import annotations

import pytest
import torch

from rrsq import kernels
from rrsq.kernels.float_gemm import prepared_float_gemm
from rrsq.kernels.plans import FusedPlan

from .problems import (
    Weight,
    added,
    assert_close,
    assert_rounded_once,
    both,
    make_problem,
    needs_triton,
    random_bias,
    relative_error,
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


def float_problem(tokens, out_features, in_features, group_size, bias, dtype, device, kind="random"):
    """Activations, a weight, and the product in float64."""
    problem = make_problem(tokens, out_features, in_features, group_size, bias, kind, device)
    x = (problem.operand * problem.scale[:, None]).to(dtype)
    weight = (problem.packed, problem.weight_scale, problem.multiplier, problem.bias)
    matrix = kernels.weight_operand(problem.packed, problem.multiplier).double()
    expected = x.double() @ matrix.T * problem.weight_scale.double()
    return x, weight, expected if problem.bias is None else expected + problem.bias.double()


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [None, 16, 32, 128])
@pytest.mark.parametrize(
    ("tokens", "out_features", "in_features", "bias"),
    [(1, 40, 1024, True), (3, 130, 384, False), (17, 72, 640, True), (64, 9, 256, False)],
)
def test_few_tokens_meet_the_codes_themselves(
    tokens, out_features, in_features, bias, group_size, dtype, device
):
    """One rounding, that of the result; the weight's is not made."""
    x, weight, expected = float_problem(tokens, out_features, in_features, group_size, bias, dtype, device)
    with kernels.use_kernels("triton"):
        y = kernels.linear_w4a16(x, *weight)
    assert y.dtype == dtype
    assert_rounded_once(y, expected)


@needs_triton
@pytest.mark.parametrize(
    ("tokens", "in_features", "group_size", "dtype"),
    [
        (65, 128, 32, torch.bfloat16),
        (3, 96, 16, torch.bfloat16),
        (3, 192, 8, torch.float16),
        (3, 192, 32, torch.float32),
    ],
)
def test_what_the_codes_do_not_serve(tokens, in_features, group_size, dtype, device):
    """More tokens, rows that do not split into words, small groups, float32: dequantized as before."""
    x, weight, expected = float_problem(tokens, 20, in_features, group_size, True, dtype, device)
    with kernels.use_kernels("triton"):
        y = kernels.linear_w4a16(x, *weight)
    assert relative_error(y, expected) < {torch.float32: 1e-6}.get(dtype, 1e-2)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 17, 65])
def test_signed_multipliers(tokens, dtype, device):
    x, weight, expected = float_problem(tokens, 40, 256, 32, True, dtype, device, kind="signed")
    assert weight[2].dtype == torch.int8
    with kernels.use_kernels("triton"):
        y = kernels.linear_w4a16(x, *weight)
    assert relative_error(y, expected) < 2e-2


PLANS = [
    FusedPlan(16, 64, 128, 1, 4, 3),
    FusedPlan(16, 64, 64, 3, 4, 2),
    FusedPlan(32, 128, 64, 2, 4, 2),
    FusedPlan(64, 128, 128, 4, 8, 2),
]


@needs_triton
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("in_features", [64, 960])
def test_every_plan_writes_everything_and_repeats_itself(plan, in_features, device):
    """Zero rows and channels that no step divides; outputs held NaN before."""
    x, weight, expected = float_problem(20, 70, in_features, 32, True, torch.bfloat16, device)
    x[::3] = 0
    packed, scale, multiplier, bias = weight
    expected[::3] = bias.double()
    results = []
    for _ in range(2):
        out = torch.full((20, 70), float("nan"), device=device)
        prepared_float_gemm(plan, packed, scale, multiplier, bias, x.shape[:-1])(x, out)
        results.append(out)
    assert relative_error(results[0], expected) < 1e-5
    assert torch.equal(*results)


@needs_triton
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_no_tokens(backend, device):
    x, weight, _ = float_problem(1, 20, 128, 32, False, torch.bfloat16, device)
    with kernels.use_kernels(backend):
        assert kernels.linear_w4a16(x[:0], *weight).shape == (0, 20)


@needs_triton
def test_prepared(device):
    """What was looked up for one tensor serves others of its shape."""
    x, weight, _ = float_problem(3, 40, 128, 32, True, torch.bfloat16, device)
    with kernels.use_kernels("triton"):
        run = kernels.linear_w4a16.prepare(x, *weight, None)
        for given in (x, -x):
            assert torch.equal(run(given), kernels.linear_w4a16(given, *weight))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [None, 16, 32])
@pytest.mark.parametrize("tokens", [1, 33, 64])
@pytest.mark.parametrize(("out_features", "in_features"), [(4096, 4096), (4096, 14336), (130, 576)])
def test_real_sizes(out_features, in_features, tokens, group_size, dtype, device):
    x, weight, expected = float_problem(tokens, out_features, in_features, group_size, True, dtype, device)
    y = kernels.linear_w4a16(x, *weight)
    # The tensor cores keep fewer bits than float32 of a sum of 16-bit products.
    assert relative_error(y, expected) < torch.finfo(dtype).eps / 2 + 1e-4
    for _ in range(5):
        assert torch.equal(kernels.linear_w4a16(x, *weight), y)
