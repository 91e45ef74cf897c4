"""Experts with 16-bit activations and with real group scales, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rrsq.kernels import route_rows

from .grouped_problems import ROUTINGS, make_grouped, run
from .problems import relative_error

pytest.importorskip("triton")

# What a step of K takes, and what the sums' rounding may cost: the kernels multiply 16-bit activations with
# exact weights, the loop rounds the dequantized weight to their dtype.
OPERANDS: dict[str, dict[str, Any]] = {
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    "scales of the sequence": {"smoothing": (128, 1 << 20)},
    "scales of 4 tokens": {"smoothing": (128, 4)},
    "scales of a token": {"smoothing": (128, 1)},
}
ROUNDING = {"float16": 1e-3, "bfloat16": 8e-3}
every_operand = pytest.mark.parametrize("operand", OPERANDS)


def tolerance(operand: str, backend: str) -> float:
    return 2e-6 if backend == "triton" else ROUNDING.get(operand, 2e-6)


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("backend", ["triton", "eager"])
@every_operand
def test_against_float64(operand, backend, tokens, kind, device):
    problem = make_grouped(
        tokens, 8, 18, 256, rows_per_token=2, kind=kind, device=device, **OPERANDS[operand]
    )
    assert relative_error(run(problem, backend), problem.expected) < tolerance(operand, backend)


@pytest.mark.parametrize("tokens", [40, 80, 150, 300])
@every_operand
def test_larger_blocks(operand, tokens, device):
    """20, 40, 75 and 150 rows an expert: blocks of 32, 64 and 128 rows, and several of them."""
    problem = make_grouped(tokens, 2, 40, 128, kind="skewed", device=device, **OPERANDS[operand])
    assert route_rows(problem.experts, 2).block_rows == {40: 32, 80: 64}.get(tokens, 128)
    assert relative_error(run(problem, "triton"), problem.expected) < tolerance(operand, "triton")


@pytest.mark.parametrize("in_features", [64, 192, 576, 960])
@pytest.mark.parametrize("tokens", [1, 20])
def test_channels_that_no_step_divides(tokens, in_features, device):
    problem = make_grouped(tokens, 4, 9, in_features, device=device, dtype=torch.bfloat16)
    assert relative_error(run(problem, "triton"), problem.expected) < tolerance("bfloat16", "triton")


@pytest.mark.parametrize("channels", [128, 256])
@pytest.mark.parametrize("tokens", [1, 20])
def test_every_size_of_smoothing_group(tokens, channels, device):
    problem = make_grouped(tokens, 4, 9, 768, device=device, smoothing=(channels, 1))
    assert relative_error(run(problem, "triton"), problem.expected) < 2e-6


@pytest.mark.parametrize("group_size", [None, 16, 64, 128, 256])
@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("operand", ["bfloat16", "scales of a token"])
def test_every_group_size_of_weights(operand, tokens, group_size, device):
    problem = make_grouped(tokens, 4, 6, 256, group_size=group_size, device=device, **OPERANDS[operand])
    assert relative_error(run(problem, "triton"), problem.expected) < tolerance(operand, "triton")


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("operand", ["bfloat16", "scales of 4 tokens"])
def test_a_split_sum_is_repeatable(operand, rows, device):
    problem = make_grouped(rows, 4, 72, 2048, device=device, **OPERANDS[operand])
    first = run(problem, "triton")
    assert relative_error(first, problem.expected) < tolerance(operand, "triton")
    assert torch.equal(run(problem, "triton"), first)


@pytest.mark.parametrize("tokens", [1, 20])
@every_operand
def test_every_element_is_written(operand, tokens, device, monkeypatch):
    """Outputs that held NaN before: what a kernel leaves out would show."""
    original = torch.empty

    def filled(*size, **options):
        tensor = original(*size, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    problem = make_grouped(tokens, 4, 13, 128, kind="every_other", device=device, **OPERANDS[operand])
    monkeypatch.setattr(torch, "empty", filled)
    actual = run(problem, "triton")
    monkeypatch.undo()
    assert relative_error(actual, problem.expected) < tolerance(operand, "triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_operand
def test_output_dtypes(operand, dtype, device):
    problem = make_grouped(12, 8, 12, 256, rows_per_token=2, device=device, **OPERANDS[operand])
    actual = run(problem, "triton", dtype)
    assert actual.dtype is dtype
    assert relative_error(actual, problem.expected) < (1e-3 if dtype is torch.float16 else 8e-3)


@pytest.mark.parametrize("backend", ["triton", "eager"])
@every_operand
def test_no_tokens(operand, backend, device):
    problem = make_grouped(1, 4, 8, 128, device=device, **OPERANDS[operand])
    problem.operand, problem.experts = problem.operand[:0], problem.experts[:0]
    problem.scale = None if problem.scale is None else problem.scale[:0]
    assert run(problem, backend).shape == (0, 8)


def test_operands_that_no_kernel_takes_run_expert_by_expert(device):
    """Float32 activations, and groups that are not whole packing blocks."""
    for options in ({"dtype": torch.float32}, {"smoothing": (32, 4)}):
        problem = make_grouped(10, 4, 24, 128, rows_per_token=2, device=device, **options)
        assert relative_error(run(problem, None), problem.expected) < 1e-5
