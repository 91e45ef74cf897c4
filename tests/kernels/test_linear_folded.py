"""Every plan of the folded product against float64, in outputs that held NaN before."""

from __future__ import annotations

import pytest
import torch

from rrsq import kernels

from .problems import KINDS, make_problem, relative_error

pytest.importorskip("triton")

from rrsq.kernels.triton.launch import launch
from rrsq.kernels.triton.plans import FusedPlan, GemvPlan, TwoPassPlan

# One unit in the last place: the interpreter truncates where hardware rounds.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
FUSED = FusedPlan(block_tokens=16, block_out=32, block_bytes=64, split=1, warps=4, stages=2)
SPLIT = FusedPlan(block_tokens=16, block_out=64, block_bytes=64, split=3, warps=4, stages=2)
POINTERS = TwoPassPlan(32, 32, 64, 4, 4, 2, False)
DESCRIPTORS = TwoPassPlan(32, 32, 64, 4, 4, 2, True)
GEMV = GemvPlan(chunks=8, warps=2)


def tokens_of(plan, tokens):
    """A GEMV serves one token."""
    return 1 if isinstance(plan, GemvPlan) else tokens


def run(plan, problem, dtype=torch.float32):
    tokens, out_features = problem.expected.shape
    out = torch.full((tokens, out_features), float("nan"), dtype=dtype, device=problem.operand.device)
    launch(
        plan,
        problem.operand,
        problem.scale,
        problem.packed,
        problem.weight_scale,
        problem.multiplier,
        problem.bias,
        out,
    )
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plan", [GEMV, FUSED, SPLIT, POINTERS, DESCRIPTORS], ids=lambda plan: plan.kind)
def test_adversarial_inputs(plan, kind, device):
    problem = make_problem(tokens_of(plan, 3), 72, 256, kind=kind, device=device)
    assert relative_error(run(plan, problem), problem.expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("plan", [GEMV, FUSED, SPLIT, POINTERS, DESCRIPTORS], ids=lambda plan: plan.kind)
def test_the_reference_to_the_bit(plan, device):
    problem = make_problem(tokens_of(plan, 17), 72, 256, device=device)
    with kernels.use_kernels("eager"):
        expected = kernels.linear_folded(
            problem.operand,
            problem.scale,
            problem.packed,
            problem.weight_scale,
            problem.multiplier,
            problem.bias,
            torch.float32,
        )
    assert torch.equal(run(plan, problem), expected)


@pytest.mark.parametrize("in_features", [64, 192, 576, 960])
@pytest.mark.parametrize("plan", [GEMV, FUSED, SPLIT, POINTERS, DESCRIPTORS], ids=lambda plan: plan.kind)
def test_channels_that_no_block_divides(plan, in_features, device):
    problem = make_problem(tokens_of(plan, 2), 40, in_features, device=device)
    assert relative_error(run(plan, problem), problem.expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("in_features", [2, 34, 100])
def test_two_passes_take_any_even_number_of_channels(in_features, device):
    problem = make_problem(5, 9, in_features, group_size=None, device=device)
    assert relative_error(run(POINTERS, problem), problem.expected) < TOLERANCE[torch.float32]
    assert relative_error(run(DESCRIPTORS, problem), problem.expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("group_size", [None, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("plan", [GEMV, FUSED, SPLIT, POINTERS], ids=lambda plan: plan.kind)
def test_every_group_size(plan, group_size, device):
    problem = make_problem(1, 33, 256, group_size=group_size, device=device)
    assert relative_error(run(plan, problem), problem.expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("out_features", [1, 4, 17])
def test_gemv_rows_past_a_program(out_features, device):
    problem = make_problem(1, out_features, 128, bias=False, device=device)
    assert relative_error(run(GEMV, problem), problem.expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("tokens", [17, 33])
@pytest.mark.parametrize("plan", [FUSED, SPLIT, POINTERS, DESCRIPTORS], ids=lambda plan: plan.kind)
def test_tokens_past_a_tile(plan, tokens, device):
    problem = make_problem(tokens, 40, 128, bias=False, device=device)
    assert relative_error(run(plan, problem), problem.expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_output_dtypes_differ_from_eager_by_rounding_only(dtype, device):
    problem = make_problem(3, 40, 256, device=device)
    arguments = (
        problem.operand,
        problem.scale,
        problem.packed,
        problem.weight_scale,
        problem.multiplier,
        problem.bias,
        dtype,
    )
    with kernels.use_kernels("triton"):
        actual = kernels.linear_folded(*arguments)
    with kernels.use_kernels("eager"):
        eager = kernels.linear_folded(*arguments)
    assert actual.dtype is dtype
    assert relative_error(actual, problem.expected) < TOLERANCE[dtype]
    assert relative_error(actual, eager.double()) < TOLERANCE[dtype]


def test_split_sum_is_deterministic_and_leaves_its_counters_at_zero(device):
    problem = make_problem(3, 72, 512, device=device)
    first = run(SPLIT, problem)
    for _ in range(3):
        assert torch.equal(run(SPLIT, problem), first)


def test_no_tokens(device):
    problem = make_problem(1, 8, 64, device=device)
    with kernels.use_kernels("triton"):
        out = kernels.linear_folded(
            problem.operand[:0],
            problem.scale[:0],
            problem.packed,
            problem.weight_scale,
            problem.multiplier,
            None,
            torch.bfloat16,
        )
    assert out.shape == (0, 8)


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("in_features", [64, 576, 100])
def test_unpacking(in_features, group_size, device):
    if group_size and in_features % group_size:
        group_size = in_features // 2
    problem = make_problem(1, 37, in_features, group_size=group_size, device=device)
    with kernels.use_kernels("triton"):
        actual = kernels.weight_operand(problem.packed, problem.multiplier)
    with kernels.use_kernels("eager"):
        assert torch.equal(actual, kernels.weight_operand(problem.packed, problem.multiplier))


@pytest.mark.parametrize("bias", [False, True])
def test_weight_only(bias, device):
    problem = make_problem(3, 40, 192, bias=bias, device=device)
    x = torch.randn(3, 192, device=device)
    arguments = (x, problem.packed, problem.weight_scale, problem.multiplier, problem.bias)
    with kernels.use_kernels("triton"):
        actual = kernels.linear_weight_only(*arguments)
    with kernels.use_kernels("eager"):
        torch.testing.assert_close(actual, kernels.linear_weight_only(*arguments), rtol=1e-5, atol=1e-5)
