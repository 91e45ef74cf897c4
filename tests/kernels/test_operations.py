"""All operations as torch.library and the choice of kernels see them."""

from __future__ import annotations

import pytest
import torch

from rrsq import kernels
from rrsq.errors import KernelUnavailableError
from rrsq.kernels.operation import Target, operations

from .problems import make_problem

OPERATIONS = (
    "weight_operand",
    "hadamard_transform",
    "quantize_tokens",
    "quantize_smoothed",
    "linear_int8",
    "linear_group_scaled",
    "linear_w4a16",
    "linear_w8a16",
    "grouped_linear",
    "gptq_block",
)


@pytest.fixture
def problem():
    return make_problem(5, 24, 96, device="cpu")


def test_shapes_and_dtypes_of_the_fake_implementations(problem):
    x = torch.randn(5, 96, dtype=torch.bfloat16)
    base = torch.ones(1, 1)
    p = problem
    ops = torch.ops.rrsq
    checks = {"test_schema", "test_faketensor"}
    cases = [
        (ops.quantize_tokens, (x, 4, 32, 1.0, base, 32, 3)),
        (ops.quantize_tokens, (x, 8, None, 1.0, None, 0, 1)),
        (ops.quantize_smoothed, (x, 4, 32, "token", "max", 1.0, None, None, 0, 1)),
        (ops.quantize_smoothed, (x, 4, 32, "block", "token_normalized_max", 1.0, None, None, 0, 1)),
        (ops.quantize_smoothed, (x, 4, 32, "sequence", "max", 1.0, None, base, 32, 1)),
        (ops.hadamard_transform, (x, base, 32, 1)),
        (ops.weight_operand, (p.packed, p.multiplier)),
        (
            ops.linear_int8,
            (p.operand, p.scale, p.packed, p.weight_scale, p.multiplier, p.bias, torch.bfloat16, None),
        ),
        (
            ops.linear_group_scaled,
            (p.operand, p.scale, torch.rand(5, 3), 1, p.packed, p.weight_scale, p.bias, torch.float16),
        ),
        (ops.gptq_block, (torch.randn(4, 6), torch.rand(4, 6) + 0.1, torch.eye(4))),
        (ops.linear_w8a16, (x, torch.ones(24, 96, dtype=torch.int8), p.weight_scale, p.bias)),
        (ops.linear_w4a16, (x, p.packed, p.weight_scale, p.multiplier, p.bias, None)),
        (
            ops.grouped_linear,
            (
                *(p.operand, p.scale, None, 1),
                *kernels.route_rows(torch.tensor([0, 1, 1, 0, 1]), 2),
                *(1, p.packed.view(2, 12, 48), p.weight_scale.view(2, 12)),
                *(p.multiplier.view(2, 12, -1), torch.bfloat16, None),
            ),
        ),
    ]
    assert {str(op).removeprefix("rrsq.") for op, _ in cases} == set(OPERATIONS)
    with kernels.use_kernels("eager"):
        for op, arguments in cases:
            torch.library.opcheck(op.default, arguments, test_utils=sorted(checks))


def test_compiled_in_one_graph(problem):
    def linear(x):
        operand, scale = kernels.quantize_tokens(x, 4, 32, 1.0)
        return kernels.linear_int8(
            operand, scale, problem.packed, problem.weight_scale, problem.multiplier, None, torch.float32
        )

    x = torch.randn(5, 96)
    with kernels.use_kernels("eager"):
        compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), linear(x))


def test_every_operation_has_an_eager_and_a_triton_kernel():
    assert set(OPERATIONS) <= set(operations())
    for name in OPERATIONS:
        assert [kernel.name for kernel in operations()[name].kernels] == [f"triton.{name}", f"eager.{name}"]


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_cpu_uses_the_reference_unless_asked_and_a_gpu_the_kernel(name):
    operation = operations()[name]
    assert operation.select(Target("cpu"), operation.typical).backend == "eager"
    gpu = Target("cuda", (9, 0), assumed=True)
    assert operation.select(gpu, operation.typical).backend == "triton"
    with kernels.use_kernels("eager"):
        assert operation.select(gpu, operation.typical).backend == "eager"


def test_an_error_lists_every_candidate_with_its_reasons(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(1, 8, dtype=torch.float64)
    with kernels.use_kernels("triton"), pytest.raises(KernelUnavailableError) as caught:
        kernels.quantize_tokens(x, 4, 24, 1.0)
    message = str(caught.value)
    assert "no kernel for quantize_tokens on cpu (x torch.float64, channels 8, group_size 24)" in message
    assert "eager.quantize_tokens: the backend triton was asked for" in message
    for reason in (
        "runs on cuda, not on cpu",
        "x of torch.float64 is not supported",
        "channels = 8 is less than 32",
        "group_size = 24 is not a power of two",
    ):
        assert reason in message
