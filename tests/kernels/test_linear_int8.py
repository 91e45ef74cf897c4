"""The product of int8 operands: the reference and every plan against float64, written over NaN."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from rrsq import kernels
from rrsq.kernels import packed_gemm
from rrsq.kernels.linear_int8 import int8_matmul, launch
from rrsq.kernels.plans import FusedPlan, GemvPlan, TwoPassPlan

from .problems import (
    KINDS,
    Weight,
    added,
    assert_close,
    make_problem,
    needs_triton,
    random_bias,
    relative_error,
)

linear_int8 = kernels.linear_int8.reference
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
        problem.operand,
        problem.scale,
        problem.packed,
        problem.weight_scale,
        problem.multiplier,
        problem.bias,
        dtype,
        plan=plan,
        out=out,
    )
    return out


@pytest.mark.parametrize(("m", "k", "n"), [(1, 2, 1), (1, 96, 7), (5, 576, 3), (33, 64, 65)])
def test_int8_matmul_is_exact(m: int, k: int, n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-128, 128, (m, k), generator=generator).to(torch.int8)
    b = torch.randint(-128, 128, (n, k), generator=generator).to(torch.int8)
    product = int8_matmul(a, b)
    assert product.dtype == torch.int32
    assert torch.equal(product.long(), a.long() @ b.long().T)


def test_the_largest_accumulation_is_exact() -> None:
    a = torch.full((2, 28672), -126, dtype=torch.int8)
    b = torch.full((3, 28672), -120, dtype=torch.int8)
    assert (int8_matmul(a, b) == 126 * 120 * 28672).all()


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("tokens", [1, 9])
def test_against_float64(tokens: int, grouped: bool, has_bias: bool) -> None:
    weight, bias = Weight(96, grouped), random_bias(has_bias)
    generator = torch.Generator().manual_seed(1)
    operand = torch.randint(-126, 127, (tokens, 96), generator=generator).to(torch.int8)
    scale = torch.rand(tokens, generator=generator)
    y = linear_int8(operand, scale, weight.packed, weight.scale, weight.multiplier, bias, torch.float32)
    dense = operand.double().numpy() * scale.double().numpy()[:, None]
    assert_close(y, added(dense @ weight.dense.T, bias))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_result_has_the_dtype_asked_for(out_dtype: torch.dtype) -> None:
    weight = Weight(96, True)
    operand = torch.ones(2, 96, dtype=torch.int8)
    scale = torch.full((2,), 0.01)
    arguments = (scale, weight.packed, weight.scale, weight.multiplier, random_bias(True))
    y = linear_int8(operand, *arguments, out_dtype)
    full = linear_int8(operand, *arguments, torch.float32)
    assert y.dtype == out_dtype
    assert torch.equal(y, full.to(out_dtype))


def test_an_unpacked_weight_gives_the_same():
    p = make_problem(5, 24, 96, device="cpu")
    with kernels.use_kernels("eager"):
        unpacked = kernels.weight_operand(p.packed, p.multiplier)
        arguments = (p.operand, p.scale, p.packed, p.weight_scale, p.multiplier, p.bias, torch.float32)
        assert torch.equal(kernels.linear_int8(*arguments), kernels.linear_int8(*arguments, unpacked))


@needs_triton
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plan", [GEMV, FUSED, SPLIT, POINTERS, DESCRIPTORS], ids=lambda plan: plan.kind)
def test_adversarial_inputs(plan, kind, device):
    problem = make_problem(tokens_of(plan, 3), 72, 256, kind=kind, device=device)
    assert relative_error(run(plan, problem), problem.expected) < TOLERANCE[torch.float32]


@needs_triton
@pytest.mark.parametrize("plan", [GEMV, FUSED, SPLIT, POINTERS, DESCRIPTORS], ids=lambda plan: plan.kind)
def test_the_reference_to_the_bit(plan, device):
    problem = make_problem(tokens_of(plan, 17), 72, 256, device=device)
    with kernels.use_kernels("eager"):
        expected = kernels.linear_int8(
            problem.operand,
            problem.scale,
            problem.packed,
            problem.weight_scale,
            problem.multiplier,
            problem.bias,
            torch.float32,
        )
    assert torch.equal(run(plan, problem), expected)


@needs_triton
@pytest.mark.parametrize("in_features", [64, 192, 576, 960])
@pytest.mark.parametrize("plan", [GEMV, FUSED, SPLIT, POINTERS, DESCRIPTORS], ids=lambda plan: plan.kind)
def test_channels_that_no_block_divides(plan, in_features, device):
    problem = make_problem(tokens_of(plan, 2), 40, in_features, device=device)
    assert relative_error(run(plan, problem), problem.expected) < TOLERANCE[torch.float32]


@needs_triton
@pytest.mark.parametrize("in_features", [2, 34, 100])
def test_two_passes_take_any_even_number_of_channels(in_features, device):
    problem = make_problem(5, 9, in_features, group_size=None, device=device)
    assert relative_error(run(POINTERS, problem), problem.expected) < TOLERANCE[torch.float32]
    assert relative_error(run(DESCRIPTORS, problem), problem.expected) < TOLERANCE[torch.float32]


@needs_triton
@pytest.mark.parametrize("group_size", [None, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("plan", [GEMV, FUSED, SPLIT, POINTERS], ids=lambda plan: plan.kind)
def test_every_group_size(plan, group_size, device):
    problem = make_problem(1, 33, 256, group_size=group_size, device=device)
    assert relative_error(run(plan, problem), problem.expected) < TOLERANCE[torch.float32]


@needs_triton
@pytest.mark.parametrize("out_features", [1, 4, 17])
def test_gemv_rows_past_a_program(out_features, device):
    problem = make_problem(1, out_features, 128, bias=False, device=device)
    assert relative_error(run(GEMV, problem), problem.expected) < TOLERANCE[torch.float32]


@needs_triton
@pytest.mark.parametrize("tokens", [17, 33])
@pytest.mark.parametrize("plan", [FUSED, SPLIT, POINTERS, DESCRIPTORS], ids=lambda plan: plan.kind)
def test_tokens_past_a_tile(plan, tokens, device):
    problem = make_problem(tokens, 40, 128, bias=False, device=device)
    assert relative_error(run(plan, problem), problem.expected) < TOLERANCE[torch.float32]


@needs_triton
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
        actual = kernels.linear_int8(*arguments)
    with kernels.use_kernels("eager"):
        eager = kernels.linear_int8(*arguments)
    assert actual.dtype is dtype
    assert relative_error(actual, problem.expected) < TOLERANCE[dtype]
    assert relative_error(actual, eager.double()) < TOLERANCE[dtype]


@needs_triton
def test_split_sum_is_deterministic_and_leaves_its_counters_at_zero(device):
    problem = make_problem(3, 72, 512, device=device)
    first = run(SPLIT, problem)
    for _ in range(3):
        assert torch.equal(run(SPLIT, problem), first)


def test_room_for_a_split_sum_is_kept_by_thread_and_grows(device, monkeypatch):
    monkeypatch.setattr(packed_gemm, "_rooms", {})
    monkeypatch.setattr(packed_gemm, "_KEPT_PARTS", 3 * 16 * 64)
    unused = torch.zeros(1, device=device)

    def room(out_features, dtype=torch.int32):
        return packed_gemm.Tiles.of(SPLIT, 1, out_features, 512).room(dtype, unused)

    small, counters = room(8)
    again, same_counters = room(64)
    assert again is small
    assert same_counters is counters
    with ThreadPoolExecutor(1) as other:
        elsewhere = other.submit(room, 64).result()
    assert (elsewhere[0] is small) == (device.type == "cuda")  # Threads share a stream there.
    assert room(64, torch.float32)[0].dtype is torch.float32
    large, same_counters = room(65)
    assert large.numel() == 2 * small.numel()
    assert same_counters is counters
    assert room(64)[0] is small  # More than is kept.
    monkeypatch.setattr(packed_gemm, "_KEPT_PARTS", large.numel())
    large, same_counters = room(65)
    assert room(64)[0] is large
    assert same_counters is counters


@needs_triton
def test_no_tokens(device):
    problem = make_problem(1, 8, 64, device=device)
    with kernels.use_kernels("triton"):
        out = kernels.linear_int8(
            problem.operand[:0],
            problem.scale[:0],
            problem.packed,
            problem.weight_scale,
            problem.multiplier,
            None,
            torch.bfloat16,
        )
    assert out.shape == (0, 8)


@pytest.mark.parametrize("channels", [7, 1024, 2500])
def test_a_cpu_without_int8_multiplies_floats_exactly(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["rrsq.kernels.linear_int8"]
    monkeypatch.setattr(module, "_multiplies_int8", lambda: False)
    monkeypatch.setattr(torch, "_int_mm", None)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-128, 128, (rows, channels), generator=generator).to(torch.int8) for rows in (5, 9))
    a[0], b[0], a[1] = -128, -128, 127  # The largest sums.
    assert torch.equal(module.int8_matmul(a, b).long(), a.long() @ b.long().t())
