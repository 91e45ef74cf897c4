"""From measured losses and a number of bits to a recipe."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...errors import UsageError
from ...models import ModelFamily
from ...recipe import Activations, Recipe, Weights, parse_recipe
from .allocate import Option, allocate, cost_range
from .choices import InputChoices, ModelChoices
from .sensitivity import Losses

__all__ = ["Allocation", "Budget", "allocated_recipe", "check_budget"]

_ROUNDING = 1e-6
"""Of a budget in bytes, so that a target that is met exactly is met."""


@dataclass(frozen=True)
class Budget:
    """What may be spent, as means over the linears of the layers.

    Attributes:
        bits: stored bits of a weight, scales and multipliers included; the output head's count too. None: the
            recipe's weights and head stay.
        activation_bits: bits of an activation, weighted by the weights that it meets. None: the recipe's.
    """

    bits: float | None = None
    activation_bits: float | None = None

    def __bool__(self) -> bool:
        return self.bits is not None or self.activation_bits is not None


@dataclass(frozen=True)
class Allocation:
    """A recipe that keeps a budget.

    Attributes:
        recipe: with what is chosen as overrides.
        bits, activation_bits: what it takes, as :class:`Budget` counts.
        loss: the sum of the losses of what is chosen, nats a token: an estimate, of weights rounded to
            nearest.
        loss_before: the same of the recipe as it was.
    """

    recipe: Recipe
    bits: float
    activation_bits: float
    loss: float
    loss_before: float


def check_budget(budget: Budget, choices: ModelChoices, recipe: Recipe) -> None:
    """Refuse a budget that nothing fits, or that all fits.

    Raises:
        UsageError: the message says what is possible.
    """
    for option, target, found in (
        ("--target-bits", budget.bits, _weight_range(budget, choices)),
        ("--target-activation-bits", budget.activation_bits, _activation_range(choices)),
    ):
        least, most = found
        if target is not None and not least - _ROUNDING <= target <= most + _ROUNDING:
            # The least is rounded up and the most down, so that what is said is possible.
            raise UsageError(
                f"{option} {target:g} is out of reach: with the recipe '{recipe.name}' this model can have"
                f" {math.ceil(1000 * least - _ROUNDING) / 1000:g} to"
                f" {math.floor(1000 * most + _ROUNDING) / 1000:g}."
            )


def _weight_range(budget: Budget, choices: ModelChoices) -> tuple[float, float]:
    least, most = cost_range(_weight_items(budget, choices, None))
    return 8 * least / choices.elements, 8 * most / choices.elements


def _activation_range(choices: ModelChoices) -> tuple[float, float]:
    least, most = cost_range(_activation_items(choices, None))
    elements = sum(each.elements for each in choices.inputs)
    return least / elements, most / elements


def _weight_items(budget: Budget, choices: ModelChoices, losses: Losses | None) -> list[list[Option]]:
    """Bytes and losses of the weights of each input, and of the head; the losses are 0 where none are known.

    Weights in 16 bits have activations in 16 bits, whose loss is gone then. Not with a budget of activations:
    each would decide over the other.
    """
    items = []
    for number, each in enumerate(choices.inputs):
        options = []
        for index, weights in enumerate(each.weights):
            loss = 0.0
            if losses is not None:
                loss = losses.inputs[number].weights[index]
                loss += 0.0 if weights.bits == 16 else losses.inputs[number].activations[0]
            # What the recipe itself leaves in 16 bits has nothing else.
            if weights.bits != 16 or budget.activation_bits is None or index == 0:
                options.append(Option(each.stored(weights, choices.itemsize), loss))
        items.append(options)
    if choices.head_bits:
        known = (0.0,) * len(choices.head_bits) if losses is None else losses.head
        items.append(
            [
                Option(choices.head_stored(bits), loss)
                for bits, loss in zip(choices.head_bits, known, strict=True)
            ]
        )
    return items


def _activation_items(choices: ModelChoices, losses: Losses | None) -> list[list[Option]]:
    return [
        [
            Option(
                activations.bits * each.elements,
                0.0 if losses is None else losses.inputs[number].activations[index],
            )
            for index, activations in enumerate(each.activations)
        ]
        for number, each in enumerate(choices.inputs)
    ]


def allocated_recipe(
    recipe: Recipe, family: ModelFamily, choices: ModelChoices, losses: Losses, budget: Budget
) -> Allocation:
    """The recipe of least loss within a budget.

    Args:
        recipe: that is varied.
        family, choices, losses: of a model.
        budget: which :func:`check_budget` has let pass.
    """
    count = len(choices.inputs)
    weights, activations, head = [0] * count, [0] * count, recipe.head.bits
    if budget.bits is not None:
        items = _weight_items(budget, choices, losses)
        taken = allocate(items, math.floor(budget.bits * choices.elements / 8 + _ROUNDING))
        weights = taken[:count]
        if choices.head_bits:
            head = choices.head_bits[taken[count]]  # type: ignore[assignment]
    if budget.activation_bits is not None:
        elements = sum(each.elements for each in choices.inputs)
        activations = allocate(
            _activation_items(choices, losses), math.floor(budget.activation_bits * elements + _ROUNDING)
        )
    chosen = {
        (each.layer, each.path): _sections(each, weights[number], activations[number])
        for number, each in enumerate(choices.inputs)
    }
    data = recipe.model_dump(mode="json")
    data["name"] = _name(recipe, budget)
    data["description"] = f"{recipe.name} within a budget of bits, spent by measured sensitivity."[:300]
    data["head"] = {"bits": head}
    data["overrides"] += list(_overrides(family, choices, chosen))
    return Allocation(
        parse_recipe(data, recipe.name),
        _bits(choices, weights, head),
        _activation_bits(choices, chosen),
        _loss(choices, losses, weights, activations, head),
        _loss(choices, losses, [0] * count, [0] * count, recipe.head.bits),
    )


def _name(recipe: Recipe, budget: Budget) -> str:
    name = recipe.name[:60]
    if budget.bits is not None:
        name += f"-w{budget.bits:g}"
    return name if budget.activation_bits is None else f"{name}-a{budget.activation_bits:g}"


def _sections(each: InputChoices, weights: int, activations: int) -> tuple[Weights, Activations]:
    section = each.weights[weights]
    return section, Activations(bits=16) if section.bits == 16 else each.activations[activations]


def _bits(choices: ModelChoices, weights: list[int], head: int) -> float:
    stored = sum(
        each.stored(each.weights[index], choices.itemsize)
        for each, index in zip(choices.inputs, weights, strict=True)
    )
    return 8 * (stored + (choices.head_stored(head) if choices.head_bits else 0)) / choices.elements


def _activation_bits(
    choices: ModelChoices, chosen: dict[tuple[int, str], tuple[Weights, Activations]]
) -> float:
    bits = sum(chosen[each.layer, each.path][1].bits * each.elements for each in choices.inputs)
    return bits / sum(each.elements for each in choices.inputs)


def _loss(
    choices: ModelChoices, losses: Losses, weights: list[int], activations: list[int], head: int
) -> float:
    total = losses.head[choices.head_bits.index(head)] if choices.head_bits else 0.0
    for each, known, w, a in zip(choices.inputs, losses.inputs, weights, activations, strict=True):
        total += known.weights[w] + (0.0 if each.weights[w].bits == 16 else known.activations[a])
    return total


def _overrides(
    family: ModelFamily,
    choices: ModelChoices,
    chosen: dict[tuple[int, str], tuple[Weights, Activations]],
) -> Iterator[dict[str, Any]]:
    """What turns the recipe into what is chosen: a pattern for what most layers have, then the others."""
    for path in dict.fromkeys(each.path for each in choices.inputs):
        inputs = [each for each in choices.inputs if each.path == path]
        now = {each.layer: (each.weights[0], each.activations[0]) for each in inputs}
        wanted = {each.layer: chosen[each.layer, path] for each in inputs}
        usual = Counter(wanted.values()).most_common(1)[0][0]
        if any(sections != usual for sections in now.values()):
            before = set(now.values())
            yield _override(f"{family.layers}.*.{path}", usual, before.pop() if len(before) == 1 else None)
            now = dict.fromkeys(now, usual)
        for layer, sections in wanted.items():
            if sections != now[layer]:
                yield _override(f"{family.layer_name(layer)}.{path}", sections, now[layer])


def _override(
    match: str, sections: tuple[Weights, Activations], now: tuple[Weights, Activations] | None
) -> dict[str, Any]:
    """An override with the sections that change; weights in 16 bits need their activations beside them."""
    weights, activations = sections
    found: dict[str, Any] = {"match": match}
    if now is None or weights != now[0]:
        found["weights"] = weights.model_dump(mode="json")
    if now is None or activations != now[1] or weights.bits == 16:
        found["activations"] = activations.model_dump(mode="json")
    return found
