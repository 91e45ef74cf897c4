"""Random products of a mixture of experts, and what they must give in float64."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from rrsq import kernels
from rrsq.kernels import pack_int4, route_rows

__all__ = ["ROUTINGS", "GroupedProblem", "draw_experts", "make_grouped", "run"]

ROUTINGS = ("random", "one_expert", "last_expert_only", "every_other", "skewed")


@dataclass
class GroupedProblem:
    """Operands of ``grouped_linear`` and what it must give, in float64."""

    operand: Tensor
    scale: Tensor | None
    group_scale: Tensor | None
    tokens_per_set: int
    experts: Tensor
    rows_per_token: int
    packed: Tensor
    weight_scale: Tensor
    multiplier: Tensor | None
    expected: Tensor


def draw_experts(kind: str, rows: int, num_experts: int, generator: torch.Generator) -> Tensor:
    if kind == "one_expert":
        return torch.zeros(rows, dtype=torch.int64)
    if kind == "last_expert_only":
        return torch.full((rows,), num_experts - 1)
    experts = torch.randint(0, num_experts, (rows,), generator=generator)
    if kind == "every_other":
        return experts // 2 * 2
    if kind == "skewed":
        return torch.where(torch.rand(rows, generator=generator) < 0.7, 1 % num_experts, experts)
    return experts


def make_grouped(
    tokens: int,
    num_experts: int,
    out_features: int,
    in_features: int,
    group_size: int | None = 32,
    rows_per_token: int = 1,
    kind: str = "random",
    device: torch.device | str = "cpu",
    seed: int = 0,
    smoothing: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.int8,
    signed: bool = False,
) -> GroupedProblem:
    """Draw a problem; ``expected`` is one float64 product a row.

    ``smoothing``: channels of a group and tokens of a set of real group scales. A floating ``dtype``:
    activations without scales. ``signed``: multipliers have signs.
    """
    generator = torch.Generator().manual_seed(seed)
    operand = torch.randint(-126, 127, (tokens, in_features), generator=generator, dtype=torch.int8)
    codes = torch.randint(-8, 8, (num_experts, out_features, in_features), generator=generator)
    scale = torch.rand(tokens, generator=generator) + 0.1
    weight_scale = torch.rand(num_experts, out_features, generator=generator) * 1e-3
    experts = draw_experts(kind, tokens * rows_per_token, num_experts, generator)
    packed = torch.stack([pack_int4(matrix) for matrix in codes])
    weight, multiplier, group_scale, tokens_per_set = codes.double(), None, None, 1
    if group_size is not None:
        shape = (num_experts, out_features, in_features // group_size)
        multiplier = torch.randint(1, 16, shape, generator=generator, dtype=torch.uint8)
        if signed:
            signs = 2 * torch.randint(0, 2, shape, generator=generator, dtype=torch.int8) - 1
            multiplier = multiplier.to(torch.int8) * signs
        weight = weight * multiplier.double().repeat_interleave(group_size, 2)
    if dtype.is_floating_point:
        operand = (operand * scale[:, None]).to(dtype)
        scale = torch.ones(tokens)
    x = operand.double() * scale[:, None].double()
    if smoothing is not None:
        channels, tokens_per_set = smoothing
        group_scale = torch.rand(-(-tokens // tokens_per_set), in_features // channels, generator=generator)
        each = group_scale.repeat_interleave(tokens_per_set, 0)[:tokens].repeat_interleave(channels, 1)
        x = x * each.double()
    expected = torch.empty(len(experts), out_features, dtype=torch.float64)
    for row, expert in enumerate(experts.tolist()):
        expected[row] = weight[expert] @ x[row // rows_per_token] * weight_scale[expert].double()

    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    return GroupedProblem(
        operand.to(device),
        None if dtype.is_floating_point else scale.to(device),
        moved(group_scale),
        tokens_per_set,
        experts.to(device),
        rows_per_token,
        packed.to(device),
        weight_scale.to(device),
        moved(multiplier),
        expected.to(device),
    )


def run(problem: GroupedProblem, backend: str | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The problem's products on the kernels of ``backend``, or on those that the dispatch chooses."""
    with nullcontext() if backend is None else kernels.use_kernels(backend):
        return kernels.grouped_linear(
            problem.operand,
            problem.scale,
            problem.group_scale,
            problem.tokens_per_set,
            *route_rows(problem.experts, problem.packed.shape[0]),
            problem.rows_per_token,
            problem.packed,
            problem.weight_scale,
            problem.multiplier,
            dtype,
        )
