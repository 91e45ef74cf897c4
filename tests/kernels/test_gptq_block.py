"""The kernel of GPTQ's blocks against the eager version and against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rrsq import kernels
from rrsq.kernels.operation import Target

from .problems import needs_triton

gptq_block = kernels.gptq_block.reference


def problem(channels: int, rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A block ``[channels, rows]``, its steps, and an upper factor with a positive diagonal."""
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(channels, rows, generator=generator)
    steps = (0.1 + torch.rand(channels, rows, generator=generator)) / 4
    upper = torch.randn(channels, channels, generator=generator).triu() * 0.05
    upper.diagonal().copy_(0.5 + torch.rand(channels, generator=generator))
    return block, steps, upper


def in_float64(block: Tensor, steps: Tensor, upper: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """What the weights become and the errors are when ``codes`` are chosen, in float64."""
    weights, steps, upper, codes = block.double().clone(), steps.double(), upper.double(), codes.double()
    errors = torch.empty_like(weights)
    for i in range(len(weights)):
        errors[i] = (weights[i] - codes[i] * steps[i]) / upper[i, i]
        weights[i + 1 :] -= upper[i, i + 1 :, None] * errors[i]
    return weights, errors


def triton_block(block: Tensor, steps: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    with kernels.use_kernels("triton"):
        return kernels.gptq_block(block, steps, upper)


@pytest.mark.parametrize("version", [gptq_block, pytest.param(triton_block, marks=needs_triton)])
@pytest.mark.parametrize(("channels", "rows"), [(1, 3), (16, 16), (37, 50), (128, 33)])
def test_codes_are_the_nearest_and_errors_are_fed_on(version: object, channels: int, rows: int) -> None:
    assert callable(version)
    block, steps, upper = problem(channels, rows)
    codes, errors = version(block, steps, upper)
    assert torch.equal(block, problem(channels, rows)[0])
    weights, exact = in_float64(block, steps, upper, codes)
    torch.testing.assert_close(errors.double(), exact, rtol=1e-4, atol=1e-4)
    assert torch.equal(codes, codes.round())
    # No other code is nearer to what the weight had become.
    nearest = (weights / steps.double()).round().clamp(-8, 7)
    excess = (codes - weights / steps).abs() - (nearest - weights / steps).abs()
    assert float(excess.max()) < 1e-4


@needs_triton
def test_both_versions_choose_the_same_codes() -> None:
    block, steps, upper = problem(128, 70, seed=1)
    upper_of_a_larger_one = torch.zeros(140, 140)
    upper_of_a_larger_one[6:134, 6:134] = upper
    eager, eager_errors = gptq_block(block, steps, upper)
    codes, errors = triton_block(block, steps, upper_of_a_larger_one[6:134, 6:134])
    assert float((codes != eager).double().mean()) < 0.001
    torch.testing.assert_close(errors, eager_errors, rtol=1e-3, atol=1e-3)


def test_a_gpu_gets_the_kernel_and_a_cpu_does_not() -> None:
    facts = kernels.gptq_block.typical
    assert kernels.gptq_block.select(Target("cpu"), facts).backend == "eager"
    assert kernels.gptq_block.select(Target("cuda", (9, 0), assumed=True), facts).backend == "triton"
