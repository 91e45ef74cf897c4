"""The product with real group scales: the reference and the kernel against float64."""

from __future__ import annotations

import pytest
import torch

from rrsq import kernels

from .problems import (
    Weight,
    added,
    assert_close,
    make_problem,
    needs_triton,
    random_bias,
    relative_error,
)

linear_group_scaled = kernels.linear_group_scaled.reference


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("tokens", "per_set"), [(1, 1), (9, 1), (9, 9), (9, 4), (131, 128)])
def test_the_reference_against_float64(tokens: int, per_set: int, grouped: bool, has_bias: bool) -> None:
    weight, bias = Weight(96, grouped), random_bias(has_bias)
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-7, 8, (tokens, 96), generator=generator).to(torch.int8)
    scale = torch.rand(tokens, generator=generator)
    group_scale = torch.rand(-(-tokens // per_set), 4, generator=generator) + 0.1
    y = linear_group_scaled(
        codes,
        scale,
        group_scale,
        per_set,
        weight.packed,
        weight.scale,
        bias,
        torch.float32,
        weight.multiplier,
    )
    dense = codes.double().numpy() * scale.double().numpy()[:, None]
    for i in range(tokens):
        dense[i] *= group_scale[i // per_set].double().numpy().repeat(24)
    assert_close(y, added(dense @ weight.dense.T, bias))


@needs_triton
@pytest.mark.parametrize(("tokens", "set_size"), [(1, 1), (5, 1), (20, 8), (70, 128)])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_against_float64(tokens, set_size, group_size, device, generator):
    problem = make_problem(tokens, 40, 384, group_size=32, device=device)
    sets = -(-tokens // set_size)
    group_scale = (torch.rand(sets, 384 // group_size, generator=generator) + 0.01).to(device)
    group_scale[0, 0] = 1e4
    with kernels.use_kernels("eager"):
        weight = kernels.weight_operand(problem.packed, problem.multiplier).double()
    per_token = group_scale.double().repeat_interleave(set_size, 0)[:tokens].repeat_interleave(group_size, 1)
    expected = (problem.operand.double() * per_token) @ weight.T
    expected = (
        expected * problem.scale.double()[:, None] * problem.weight_scale.double() + problem.bias.double()
    )
    arguments = (problem.operand, problem.scale, group_scale, set_size, problem.packed, problem.weight_scale)
    for backend in ("triton", "eager"):
        with kernels.use_kernels(backend):
            actual = kernels.linear_group_scaled(
                *arguments, problem.bias, torch.float32, weight_multiplier=problem.multiplier
            )
        assert relative_error(actual, expected) < 1e-5
