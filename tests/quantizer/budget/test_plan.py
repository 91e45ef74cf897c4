"""From made-up losses to a recipe: what holds at each input, and what its tensors take."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch

from rrsq.errors import UsageError
from rrsq.models import family_for
from rrsq.quantizer.budget.choices import ModelChoices, model_choices
from rrsq.quantizer.budget.plan import Allocation, Budget, allocated_recipe, check_budget
from rrsq.quantizer.budget.sensitivity import InputLosses, Losses
from rrsq.quantizer.production.output_shards import planned_tensors
from rrsq.recipe import Recipe, parse_recipe
from rrsq.runtime.format.describe import LinearBits, linear_bits
from rrsq.runtime.scheme import sections_at, treatment
from tiny_families import tiny_model
from tiny_quantized import recipe_of

FAMILIES = ["llama", "gemma3_text", "opt", "phi3"]


def choices_of(name: str, recipe: Recipe) -> tuple[Any, ModelChoices]:
    model = tiny_model(name)
    return model, model_choices(model, family_for(model.config), recipe, torch.bfloat16)


def made_up(choices: ModelChoices, seed: int = 0) -> Losses:
    """Fewer bits have more loss, by another factor at each input."""
    draw = random.Random(seed)
    inputs = []
    for each in choices.inputs:
        scale = 10 ** draw.uniform(-3, 0)
        stored = [each.stored(weights, 2) for weights in each.weights]
        weights = [0.0 if w.bits == 16 else scale / s for w, s in zip(each.weights, stored, strict=True)]
        activations = [0.0 if a.bits == 16 else scale * 4.0**-a.bits for a in each.activations]
        inputs.append(
            InputLosses(
                layer=each.layer, path=each.path, weights=tuple(weights), activations=tuple(activations)
            )
        )
    return Losses(tokens=1, inputs=tuple(inputs), head=(0.1, 0.01, 0.0) if choices.head_bits else ())


def allocated(name: str, recipe: Recipe, budget: Budget) -> tuple[Any, ModelChoices, Allocation]:
    model, choices = choices_of(name, recipe)
    check_budget(budget, choices, recipe)
    family = family_for(model.config)
    return model, choices, allocated_recipe(recipe, family, choices, made_up(choices), budget)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("recipe", "budget"),
    [
        ("rrs-w4a4kv4", Budget(bits=7.5)),
        ("rrs-w4a4kv4", Budget(bits=6.0, activation_bits=5.0)),
        ("rrs-w4a8kv4", Budget(activation_bits=9.0)),
        ("rrs1-w4a4kv4", Budget(bits=6.5)),
    ],
)
def test_its_tensors_take_what_it_says(name: str, recipe: str, budget: Budget) -> None:
    model, _, found = allocated(name, recipe_of(recipe), budget)
    bits = check_tensors(model, found)
    assert budget.bits is None or bits.weights <= budget.bits
    assert budget.activation_bits is None or bits.activations <= budget.activation_bits
    assert found.loss < found.loss_before or budget.bits is not None
    assert parse_recipe(found.recipe.model_dump(mode="json"), "again") == found.recipe


def check_tensors(model: Any, found: Allocation) -> LinearBits:
    """The tensors of an allocation's recipe take what it says."""
    planned = planned_tensors(model.config, torch.bfloat16, found.recipe)
    tensors = [(key, tuple(tensor.shape), tensor.nbytes) for key, tensor in planned.items()]
    bits = linear_bits(tensors, found.recipe, family_for(model.config))
    assert bits is not None
    assert bits.weights == pytest.approx(found.bits)
    assert bits.activations == pytest.approx(found.activation_bits)
    return bits


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("overrides", [[], ["embedding.bits=4", "head.bits=16"], ["head.bits=16"]])
def test_the_most_that_is_possible_is_what_a_tied_head_can_have(name: str, overrides: list[str]) -> None:
    """One that has the embedding's codes has no 16 bits."""
    recipe = recipe_of("rrs-w4a4kv4", overrides)
    model, choices = choices_of(name, recipe)
    tied = model.config.tie_word_embeddings
    assert (choices.tied_to is not None) == tied
    with pytest.raises(UsageError, match=r"can have [0-9.]+ to [0-9.]+\.") as caught:
        check_budget(Budget(bits=16.1), choices, recipe)
    most = float(str(caught.value).split()[-1].rstrip("."))
    assert most < 16 if tied else most == 16
    _, _, found = allocated(name, recipe, Budget(bits=most))
    check_tensors(model, found)


def test_no_recipe_within_the_budget_has_less_loss() -> None:
    """All recipes of a model with two inputs that may change are tried."""
    kept = "modules_to_not_convert=['*.self_attn.*', '*.layers.1.*', '*.layers.2.*', 'lm_head']"
    recipe = recipe_of("rrs-w4a4kv4", [kept])
    _, choices, found = allocated("llama", recipe, Budget(bits=7.0))
    losses = made_up(choices)
    assert len(choices.inputs) == 2
    best = float("inf")
    for taken in itertools.product(*(range(len(each.weights)) for each in choices.inputs)):
        stored = sum(c.stored(c.weights[i], 2) for c, i in zip(choices.inputs, taken, strict=True))
        loss = sum(
            known.weights[i] + (0 if each.weights[i].bits == 16 else known.activations[0])
            for each, known, i in zip(choices.inputs, losses.inputs, taken, strict=True)
        )
        if 8 * stored <= 7.0 * choices.elements:
            best = min(best, loss)
    assert found.loss == pytest.approx(best)


def test_overrides_of_the_recipe_stay_where_nothing_else_is_chosen() -> None:
    """An input that the recipe leaves in 16 bits counts and stays; the others keep their method."""
    options = [
        'overrides=[{match: "*.0.mlp.down", weights: {bits: 16}, activations: {bits: 16}},'
        '{match: "*.1.*", weights: {method: rtn, group_size: 32}}]'
    ]
    recipe = recipe_of("rrs-w4a4kv4", options)
    model, choices, found = allocated("llama", recipe, Budget(activation_bits=6.0))
    family = family_for(model.config)
    for each in choices.inputs:
        name = family.layer_name(each.layer)
        entry = next(entry for entry in family.inputs if entry.path == each.path)
        before, after = (sections_at(r, name, entry) for r in (recipe, found.recipe))
        assert before[0] == after[0]
        if each.path == "mlp.down" and each.layer == 0:
            assert after[1].bits == 16
            assert treatment(found.recipe, name, entry).linears == ()
    assert len(found.recipe.overrides) > 2


def test_what_most_layers_have_is_one_override() -> None:
    recipe = recipe_of("rrs-w4a4kv4")
    _, choices, found = allocated("llama", recipe, Budget(activation_bits=8.0))
    assert {o.match for o in found.recipe.overrides} >= {"model.layers.*.mlp.down"}
    assert len(found.recipe.overrides) < len(choices.inputs)
