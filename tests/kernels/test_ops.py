"""The ops as torch.library sees them: schemas, fake implementations, capture in one graph."""

from __future__ import annotations

import pytest
import torch

from rrsq import kernels

from .problems import make_problem


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
        (ops.quantize_folded, (x, 4, 32, 1.0, base, 32, 3)),
        (ops.quantize_folded, (x, 8, None, 1.0, None, 0, 1)),
        (ops.quantize_smoothed, (x, 4, 32, "token", "max", 1.0, None, None, 0, 1)),
        (ops.quantize_smoothed, (x, 4, 32, "block", "token_normalized_max", 1.0, None, None, 0, 1)),
        (ops.quantize_smoothed, (x, 4, 32, "sequence", "max", 1.0, None, base, 32, 1)),
        (ops.hadamard_transform, (x, base, 32, 1)),
        (ops.weight_operand, (p.packed, p.multiplier)),
        (
            ops.linear_folded,
            (p.operand, p.scale, p.packed, p.weight_scale, p.multiplier, p.bias, torch.bfloat16, None),
        ),
        (ops.linear_weight_only, (x, p.packed, p.weight_scale, p.multiplier, p.bias, None)),
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
    with kernels.use_kernels("eager"):
        for op, arguments in cases:
            torch.library.opcheck(op.default, arguments, test_utils=sorted(checks))


def test_compiled_in_one_graph(problem):
    def linear(x):
        operand, scale = kernels.quantize_folded(x, 4, 32, 1.0)
        return kernels.linear_folded(
            operand, scale, problem.packed, problem.weight_scale, problem.multiplier, None, torch.float32
        )

    x = torch.randn(5, 96)
    with kernels.use_kernels("eager"):
        compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), linear(x))


def test_an_unpacked_weight_gives_the_same(problem):
    p = problem
    with kernels.use_kernels("eager"):
        unpacked = kernels.weight_operand(p.packed, p.multiplier)
        arguments = (p.operand, p.scale, p.packed, p.weight_scale, p.multiplier, p.bias, torch.float32)
        assert torch.equal(kernels.linear_folded(*arguments), kernels.linear_folded(*arguments, unpacked))


def test_rotation_across_heads_is_a_rotation_with_an_inner_stride():
    x = torch.randn(3, 4 * 32, dtype=torch.float64)
    base = torch.ones(1, 1)
    with kernels.use_kernels("eager"):
        actual = kernels.hadamard_transform(x, base, 4, inner=32)
        across = kernels.hadamard_transform(x.view(3, 4, 32).mT.contiguous(), base, 4).mT.reshape(3, 128)
    torch.testing.assert_close(actual, across)
    torch.testing.assert_close(actual.norm(dim=1), x.norm(dim=1))
