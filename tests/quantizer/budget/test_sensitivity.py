"""The losses that are estimated are those that quantizing one thing at a time has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rrsq.models import family_for
from rrsq.quantizer.budget.choices import ModelChoices, model_choices
from rrsq.quantizer.budget.sensitivity import Losses, measure_losses
from rrsq.recipe import Recipe
from rrsq.runtime.modules.input import InputQuantizer
from rrsq.runtime.scheme import input_scheme
from tiny_quantized import load_tiny, logits_of, quantize_tiny, random_tokens, recipe_of

WINDOWS = random_tokens(8, 64, seed=3)


def measured(folder: Path, recipe: Recipe, windows: Tensor = WINDOWS) -> tuple[ModelChoices, Losses]:
    model = load_tiny(folder)
    family = family_for(model.config)
    choices = model_choices(model, family, recipe, torch.float32)
    return choices, measure_losses(model, family, recipe, windows, choices, lambda path, module: None)


def divergence(model: Any, exact: Tensor, windows: Tensor = WINDOWS) -> float:
    """Nats a token."""
    p, q = exact.double().log_softmax(-1), logits_of(model, windows).double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module")
def plain(tiny_llama_dir: Path) -> tuple[ModelChoices, Losses]:
    """Without rotations, so that the model in question is the original one."""
    return measured(tiny_llama_dir, recipe_of("rtn-w4a4"))


def test_losses_of_activations_are_those_of_one_input_quantized(
    plain: tuple[ModelChoices, Losses], tiny_llama_dir: Path
) -> None:
    choices, losses = plain
    model = load_tiny(tiny_llama_dir)
    family, exact = family_for(model.config), logits_of(model, WINDOWS)
    ratios = []
    for each, found in zip(choices.inputs, losses.inputs, strict=True):
        entry = next(entry for entry in family.inputs if entry.path == each.path)
        for section, loss in zip(each.activations, found.activations, strict=True):
            if section.bits == 16:
                assert loss == 0
                continue
            quantizer = InputQuantizer(input_scheme(section, entry, each.channels))
            handles = [
                model.model.layers[each.layer]
                .get_submodule(path)
                .register_forward_pre_hook(lambda module, args, by=quantizer: (by.simulate(args[0]),))
                for path in entry.linear_paths
            ]
            ratios.append(loss / divergence(model, exact))
            for handle in handles:
                handle.remove()
    assert len(ratios) == 2 * 4 * 3
    assert all(0.6 < ratio < 2.2 for ratio in ratios)


def test_losses_of_weights_are_those_of_one_input_quantized(
    plain: tuple[ModelChoices, Losses], tiny_llama_dir: Path
) -> None:
    """The pipeline itself rounds the weights, of one input in one layer, and leaves all activations."""
    choices, losses = plain
    exact = logits_of(load_tiny(tiny_llama_dir), WINDOWS)
    ratios = []
    for each, found in zip(choices.inputs, losses.inputs, strict=True):
        name = f"model.layers.{each.layer}.{each.path}"
        rounded = "weights: {method: rtn, clip_search: false}, activations: {bits: 16}"
        overrides = f"overrides=[{{match: '{name}', {rounded}}}]"
        recipe = recipe_of("w16a16kv4", ["kv_cache=null", overrides])
        ratios.append(found.weights[0] / divergence(quantize_tiny(tiny_llama_dir, recipe).model, exact))
    assert all(0.6 < ratio < 2.2 for ratio in ratios)


def test_the_loss_of_a_head_is_its_divergence(
    plain: tuple[ModelChoices, Losses], tiny_llama_dir: Path
) -> None:
    choices, losses = plain
    exact = logits_of(load_tiny(tiny_llama_dir), WINDOWS)
    for bits, loss in zip(choices.head_bits, losses.head, strict=True):
        options = [
            "kv_cache=null",
            f"head.bits={bits}",
            "weights={method: rtn, bits: 16, clip_search: false}",
        ]
        model = quantize_tiny(tiny_llama_dir, recipe_of("w16a16kv4", options)).model
        assert loss == pytest.approx(divergence(model, exact), rel=0.1, abs=1e-7)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_head_that_shares_the_embeddings_codes_has_their_loss(bits: int, tiny_llama_dir: Path) -> None:
    """Of the head alone: layers are measured behind the embedding as it was."""
    recipe = recipe_of("rtn-w4a4", [f"embedding.bits={bits}"])
    choices, losses = measured(tiny_llama_dir, recipe)
    model = load_tiny(tiny_llama_dir)
    exact = logits_of(model, WINDOWS)
    options = ["kv_cache=null", f"embedding.bits={bits}"]
    shared: Any = quantize_tiny(tiny_llama_dir, recipe_of("w16a16kv4", options)).model
    model.lm_head.weight = torch.nn.Parameter(shared.lm_head.embedding._values(slice(None)))
    loss = losses.head[choices.head_bits.index(16)]
    assert loss == pytest.approx(divergence(model, exact), rel=0.1)
    assert bits == 4 or loss == losses.head[choices.head_bits.index(8)]
