"""The product with real group scales against float64."""

from __future__ import annotations

import pytest
import torch

from rrsq import kernels

from .problems import make_problem, relative_error

pytest.importorskip("triton")


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
