"""One option for each item, so that the losses' sum is least and the costs' sum within a budget.

This is the multiple-choice knapsack problem, solved by dynamic programming over the budget. Costs are counted
in their greatest common divisor, which is large: layers are of a few shapes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["Option", "allocate", "cost_range"]

_MOST_UNITS = 2**17
"""A finer budget is cut into so many units, and costs are rounded up to them."""


@dataclass(frozen=True)
class Option:
    """Something that may be chosen for an item: what it costs, and the loss that it leaves."""

    cost: int
    loss: float


def cost_range(items: Sequence[Sequence[Option]]) -> tuple[int, int]:
    """The least and the most that a choice for all items can cost."""
    costs = [[option.cost for option in options] for options in items]
    return sum(map(min, costs)), sum(map(max, costs))


def allocate(items: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """Choose an option for each item.

    The sum of the losses is the least possible; where the costs above the least ones have more than 131,072
    times their common divisor, it may miss that by what so small a part of the budget would buy. Of equal
    losses the one that costs less is taken, then the first.

    Args:
        items: the options of each.
        budget: what all options may cost together.

    Returns:
        The index of each item's option.

    Raises:
        ValueError: even the cheapest options cost more.
    """
    least, most = cost_range(items)
    if budget < least:
        raise ValueError(f"the least cost is {least}, above {budget}")
    extras = [[option.cost - min(o.cost for o in options) for option in options] for options in items]
    unit = math.gcd(*(extra for row in extras for extra in row)) or 1
    room = min(budget, most) - least
    unit *= max(math.ceil(room / unit / _MOST_UNITS), 1)
    units = room // unit
    # best[c]: the least loss of the items so far at an extra cost of at most c units.
    best = torch.zeros(units + 1, dtype=torch.float64)
    taken = []
    for options, row in zip(items, extras, strict=True):
        found = torch.full_like(best, torch.inf)
        choice = torch.zeros(units + 1, dtype=torch.int64)
        for index in sorted(range(len(options)), key=lambda index: row[index]):
            step = -(-row[index] // unit)
            if step > units:
                continue
            loss = best[: units + 1 - step] + options[index].loss
            better = loss < found[step:]
            found[step:][better] = loss[better]
            choice[step:][better] = index
        best = found
        taken.append(choice)
    chosen = []
    left = units
    for row, choice in zip(reversed(extras), reversed(taken), strict=True):
        index = int(choice[left])
        chosen.append(index)
        left -= -(-row[index] // unit)
    return chosen[::-1]
