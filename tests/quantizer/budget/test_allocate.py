"""The allocation is the best there is: compared with all of them."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rrsq.quantizer.budget import allocate as module
from rrsq.quantizer.budget.allocate import Option, allocate, cost_range

OPTIONS = st.builds(Option, st.integers(0, 40), st.floats(0, 10, allow_nan=False))
ITEMS = st.lists(st.lists(OPTIONS, min_size=1, max_size=4), min_size=1, max_size=5)


def total(items: list[list[Option]], chosen: list[int]) -> tuple[int, float]:
    taken = [options[index] for options, index in zip(items, chosen, strict=True)]
    return sum(option.cost for option in taken), sum(option.loss for option in taken)


def least_loss(items: list[list[Option]], budget: int) -> float:
    """Of all choices that fit."""
    taken = (total(items, list(c)) for c in itertools.product(*(range(len(options)) for options in items)))
    return min(loss for cost, loss in taken if cost <= budget)


@settings(max_examples=200, deadline=None)
@given(ITEMS, st.integers(0, 200))
def test_no_other_choice_within_the_budget_has_less_loss(items: list[list[Option]], more: int) -> None:
    budget = cost_range(items)[0] + more
    cost, loss = total(items, allocate(items, budget))
    assert cost <= budget
    assert loss == pytest.approx(least_loss(items, budget), abs=1e-9)


def test_it_is_not_the_greedy_choice() -> None:
    """Loss for bits the first option is worth most; the budget then has no room for the two others."""
    items = [[Option(0, 7), Option(4, 0)], [Option(0, 5), Option(3, 0)], [Option(0, 5), Option(3, 0)]]
    assert allocate(items, 6) == [0, 1, 1]


def test_of_equal_losses_the_cheapest_is_taken() -> None:
    assert allocate([[Option(9, 1), Option(2, 1), Option(2, 1)]], 20) == [1]


def test_costs_that_have_no_common_divisor_stay_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_UNITS", 1000)
    draw = random.Random(0)
    items = [
        [Option(draw.randrange(10**9), draw.random()) for _ in range(4)] for _ in range(7)
    ]  # fmt: skip
    least, most = cost_range(items)
    budget = (least + most) // 2
    cost, loss = total(items, allocate(items, budget))
    assert cost <= budget
    best = least_loss(items, budget)
    assert best <= loss < 1.05 * best + 0.01


def test_a_budget_below_the_least_is_refused() -> None:
    with pytest.raises(ValueError, match="3"):
        allocate([[Option(3, 0)]], 2)
