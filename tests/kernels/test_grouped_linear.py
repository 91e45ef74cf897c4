"""The products of a mixture of experts: the table of blocks, and every kernel against float64."""

from __future__ import annotations

import pytest
import torch

from rrsq import kernels
from rrsq.kernels import Routing, route_rows, weight_operand
from rrsq.kernels.operation import Target

from .grouped_problems import ROUTINGS, draw_experts, make_grouped, run
from .problems import relative_error

pytest.importorskip("triton")

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def check_blocks(routing: Routing, num_experts: int) -> None:
    """Every row is in one block, and every block's rows belong to its expert."""
    rows: list[int] = []
    start, ends = routing.start.tolist(), routing.ends.tolist()
    for block, expert in enumerate(routing.blocks.tolist()):
        if expert == num_experts:
            continue
        first = start[expert] + (block - (ends[expert - 1] if expert else 0)) * routing.block_rows
        inside = routing.order[first : min(first + routing.block_rows, start[expert + 1])]
        assert 0 < len(inside) <= routing.block_rows
        assert routing.experts[inside].tolist() == [expert] * len(inside)
        rows += inside.tolist()
    assert sorted(rows) == list(range(len(routing.experts)))


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize(("rows", "num_experts"), [(3, 1), (17, 8), (64, 8), (300, 8), (33, 128), (1100, 8)])
def test_every_row_is_in_one_block_of_its_expert(kind, rows, num_experts, device, generator):
    routing = route_rows(draw_experts(kind, rows, num_experts, generator).to(device), num_experts)
    check_blocks(routing, num_experts)


def test_blocks_grow_with_the_rows_of_an_expert(generator):
    sizes = [
        route_rows(torch.randint(0, 8, (rows,), generator=generator), 8).block_rows
        for rows in (2, 3, 128, 129, 512, 513, 4096)
    ]
    assert sizes == [1, 16, 16, 32, 64, 128, 128]


def test_few_rows_are_not_sorted():
    routing = route_rows(torch.tensor([5, 1, 5]), 16)
    assert routing.block_rows == 1
    assert routing.order.numel() == routing.blocks.numel() == 0


def test_the_table_has_room_for_the_worst_case():
    """One row for each expert but the first, which has all others: every block but the last is needed."""
    num_experts, rows = 8, 8 + 120
    experts = torch.cat((torch.arange(8), torch.zeros(rows - 8, dtype=torch.int64)))
    routing = route_rows(experts, num_experts)
    check_blocks(routing, num_experts)
    assert int((routing.blocks < num_experts).sum()) == -(-121 // 16) + 7


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_against_float64(backend, tokens, kind, device):
    problem = make_grouped(tokens, 8, 18, 128, rows_per_token=2, kind=kind, device=device)
    assert relative_error(run(problem, backend), problem.expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_signed_multipliers(backend, device):
    problem = make_grouped(9, 8, 18, 128, rows_per_token=2, device=device, signed=True)
    assert problem.multiplier.dtype == torch.int8
    assert relative_error(run(problem, backend), problem.expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("tokens", [40, 80, 150, 300])
def test_larger_blocks(tokens, device):
    """20, 40, 75 and 150 rows an expert: blocks of 32, 64 and 128 rows, and several of them."""
    problem = make_grouped(tokens, 2, 40, 64, kind="skewed", device=device)
    assert route_rows(problem.experts, 2).block_rows == {40: 32, 80: 64}.get(tokens, 128)
    assert relative_error(run(problem, "triton"), problem.expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("in_features", [64, 192, 576, 960])
@pytest.mark.parametrize("tokens", [1, 20])
def test_channels_that_no_block_divides(tokens, in_features, device):
    problem = make_grouped(tokens, 4, 9, in_features, device=device)
    assert relative_error(run(problem, "triton"), problem.expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("group_size", [None, 16, 64, 128, 256])
@pytest.mark.parametrize("tokens", [1, 20])
def test_every_group_size(tokens, group_size, device):
    problem = make_grouped(tokens, 4, 6, 256, group_size=group_size, device=device)
    assert relative_error(run(problem, "triton"), problem.expected) < TOLERANCE[torch.float32]


def test_a_split_sum_is_exact_and_repeatable(device):
    problem = make_grouped(6, 4, 72, 2048, device=device)
    first = run(problem, "triton")
    assert relative_error(first, problem.expected) < TOLERANCE[torch.float32]
    assert torch.equal(run(problem, "triton"), first)


@pytest.mark.parametrize("tokens", [1, 20])
def test_every_element_is_written(tokens, device, monkeypatch):
    """Outputs that held NaN before: what a kernel leaves out would show."""
    original = torch.empty

    def filled(*size, **options):
        tensor = original(*size, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    problem = make_grouped(tokens, 4, 13, 128, kind="every_other", device=device)
    monkeypatch.setattr(torch, "empty", filled)
    actual = run(problem, "triton")
    monkeypatch.undo()
    assert relative_error(actual, problem.expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 12])
def test_output_dtypes_differ_from_eager_by_rounding_only(tokens, dtype, device):
    problem = make_grouped(tokens, 8, 12, 256, rows_per_token=2, device=device)
    actual, eager = run(problem, "triton", dtype), run(problem, "eager", dtype)
    assert actual.dtype is eager.dtype is dtype
    assert relative_error(actual, problem.expected) < TOLERANCE[dtype]
    assert relative_error(actual, eager.double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_no_tokens(backend, device):
    problem = make_grouped(1, 4, 8, 64, device=device)
    problem.operand, problem.scale, problem.experts = (
        tensor[:0] for tensor in (problem.operand, problem.scale, problem.experts)
    )
    assert run(problem, backend).shape == (0, 8)


def test_an_unpacked_weight_gives_the_same():
    p = make_grouped(9, 4, 24, 96)
    unpacked = torch.stack([weight_operand(p.packed[e], p.multiplier[e]) for e in range(4)])
    arguments = (p.operand, p.scale, None, 1, *route_rows(p.experts, 4), 1, p.packed, p.weight_scale)
    actual = kernels.grouped_linear(*arguments, p.multiplier, torch.float32, unpacked)
    assert torch.equal(actual, run(p, "eager"))


def test_the_dispatch_says_why_a_call_runs_expert_by_expert():
    facts = {"operand": torch.float32, "in_features": 96, "weight_group_size": 24, "group_size": 32}
    triton, eager = kernels.grouped_linear.explain(Target("cpu"), facts)
    assert (triton.kernel.backend, eager.kernel.backend) == ("triton", "eager")
    assert eager.reasons == ()
    for reason in (
        "operand of torch.float32 is not supported",
        "in_features = 96 is not a multiple of 64",
        "weight_group_size = 24 is not a power of two",
        "group_size = 32 is less than 128",
    ):
        assert reason in triton.reasons
