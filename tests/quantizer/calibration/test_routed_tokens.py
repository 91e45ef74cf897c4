"""Which tokens stand for an expert's inputs, and what is measured of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from rrsq.quantizer.calibration.experts import (
    RoutedTokens,
    collect_routed_tokens,
    expert_statistics,
    fewest_tokens,
)
from rrsq.runtime.modules.experts import ExpertLinear, Experts
from rrsq.runtime.modules.rotation import OnlineHadamard, RotatedLinear
from rrsq.runtime.rotation.hadamard import orthonormal, plan_hadamard

EXPERTS, HIDDEN, INNER = 4, 24, 12
CPU = torch.device("cpu")


def make_experts() -> Experts:
    generator = torch.Generator().manual_seed(0)
    gate_up = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=generator), requires_grad=False)
    down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER, generator=generator), requires_grad=False)
    rotated = RotatedLinear(OnlineHadamard(plan_hadamard(INNER)), ExpertLinear(down))
    return Experts(ExpertLinear(gate_up), rotated, nn.SiLU(), EXPERTS)


def make_tokens(*batches: int, experts: int = EXPERTS) -> RoutedTokens:
    generator = torch.Generator().manual_seed(1)
    routed = RoutedTokens(EXPERTS)
    for tokens in batches:
        hidden = torch.randn(tokens, HIDDEN, generator=generator)
        chosen = torch.rand(tokens, experts, generator=generator).topk(2, dim=-1).indices
        routed.add(hidden, chosen)
    return routed


def test_what_experts_are_called_with_is_kept() -> None:
    experts, tokens = make_experts(), make_tokens(5, 3)
    with collect_routed_tokens(experts) as routed:
        for hidden, chosen in zip(tokens.hidden, tokens.chosen, strict=True):
            experts(hidden, chosen, torch.ones(chosen.shape))
    experts(tokens.hidden[0], tokens.chosen[0], torch.ones(tokens.chosen[0].shape))
    assert len(routed.hidden) == 2
    assert all(torch.equal(a, b) for a, b in zip(routed.hidden, tokens.hidden, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(routed.chosen, tokens.chosen, strict=True))
    expected = [sum(int((chosen == expert).sum()) for chosen in tokens.chosen) for expert in range(EXPERTS)]
    assert routed.counts.tolist() == [expected]
    assert routed.tokens.tolist() == [8]
    energy = torch.cat(tokens.hidden).double().square().sum(0).float()
    torch.testing.assert_close(routed.energy, energy)
    routed.scale(torch.full((HIDDEN,), 3.0))
    torch.testing.assert_close(routed.energy, 9 * energy)
    torch.testing.assert_close(routed.hidden[1], 3 * tokens.hidden[1])


@pytest.mark.parametrize("expert", range(EXPERTS))
def test_hessians_are_sums_over_the_tokens_of_the_expert(expert: int) -> None:
    experts, routed = make_experts(), make_tokens(40, 25)
    found = expert_statistics(experts, routed, range(EXPERTS), CPU, with_hessian=True)[expert]
    R = orthonormal(plan_hadamard(INNER), torch.float64).numpy()
    weight = experts.gate_up_proj.weight[expert].double().numpy()
    sums = {"gate_up": np.zeros((HIDDEN, HIDDEN)), "down": np.zeros((INNER, INNER))}
    largest = {"gate_up": np.zeros(HIDDEN), "down": np.zeros(INNER)}
    count = 0
    for hidden, chosen in zip(routed.hidden, routed.chosen, strict=True):
        for x, choice in zip(hidden.double().numpy(), chosen.tolist(), strict=True):
            if expert not in choice:
                continue
            count += 1
            gate, up = np.split(weight @ x, 2)
            for name, row in (("gate_up", x), ("down", (gate / (1 + np.exp(-gate)) * up) @ R)):
                sums[name] += np.outer(row, row)
                largest[name] = np.maximum(largest[name], np.abs(row))
    assert count >= max(fewest_tokens(HIDDEN), fewest_tokens(INNER))
    for name, statistics in found.items():
        assert statistics.tokens == count
        assert statistics.hessian is not None
        np.testing.assert_allclose(statistics.hessian.matrix().numpy(), sums[name], rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(statistics.absmax.numpy(), largest[name], rtol=1e-5)


def test_only_the_selected_experts_are_measured() -> None:
    found = expert_statistics(make_experts(), make_tokens(30), range(1, 3), CPU, with_hessian=False)
    assert list(found) == [1, 2]
    assert all(statistics.hessian is None for both in found.values() for statistics in both.values())


@pytest.mark.parametrize(("channels", "fewest"), [(4096, 1024), (14336, 3584), (6, 2), (1, 1)])
def test_a_quarter_of_the_channels_is_enough(channels: int, fewest: int) -> None:
    assert fewest_tokens(channels) == fewest


def test_an_expert_with_enough_tokens_is_shown_no_others() -> None:
    routed = make_tokens(30, 20)
    shown = torch.cat(routed.shown_to(2, fewest=10))
    assert torch.equal(shown, (torch.cat(routed.chosen) == 2).any(1))


def test_what_is_missing_comes_from_all_over_the_text() -> None:
    found = make_tokens(60, 40, experts=3)  # Expert 3 gets none.
    found.chosen[0][5, 0] = 3
    routed = RoutedTokens(EXPERTS)
    for hidden, chosen in zip(found.hidden, found.chosen, strict=True):
        routed.add(hidden, chosen)
    shown = routed.shown_to(3, fewest=9)
    assert [part.shape[0] for part in shown] == [60, 40]
    positions = torch.cat(shown).nonzero().squeeze(1).tolist()
    assert len(positions) == 9
    assert 5 in positions
    gaps = np.diff([p for p in positions if p != 5])
    assert gaps.min() >= 12
    assert gaps.max() <= 14


def test_too_little_text_is_shown_as_a_whole() -> None:
    routed = make_tokens(7, experts=3)
    assert bool(torch.cat(routed.shown_to(3, fewest=100)).all())


@pytest.mark.parametrize("fewest", [1, 9, 50, 1000])
@pytest.mark.parametrize("expert", range(EXPERTS))
def test_processes_show_an_expert_the_tokens_that_one_process_would(expert: int, fewest: int) -> None:
    """Batches of 30, 25 and 10 tokens in three processes; the last expert gets tokens in the second alone."""
    parts = [make_tokens(30, experts=3), make_tokens(25), make_tokens(10, experts=3)]
    whole = RoutedTokens(EXPERTS)
    for part in parts:
        whole.add(part.hidden[0], part.chosen[0])
    expected = torch.cat(whole.shown_to(expert, fewest))
    counts, tokens = (torch.cat([getattr(part, name) for part in parts]) for name in ("counts", "tokens"))
    for rank, part in enumerate(parts):
        part.counts, part.tokens, part.rank = counts, tokens, rank
    shown = [torch.cat(part.shown_to(expert, fewest)) for part in parts]
    assert torch.equal(torch.cat(shown), expected)
