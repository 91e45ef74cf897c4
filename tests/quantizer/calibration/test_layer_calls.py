"""Layers run one by one see what they see in the whole model, for every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rrsq.models import family_for
from rrsq.quantizer.calibration.layer_calls import embedded, layer_calls, with_causal_masks
from rrsq.quantizer.calibration.stream import HiddenStates
from tiny_families import TINY, WINDOW, tiny_model
from tiny_quantized import random_tokens

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", TINY)
def test_the_stream_is_the_models_own(name: str) -> None:
    """Windows longer than a sliding window, in batches of two and one."""
    model = tiny_model(name)
    family = family_for(model.config)
    windows = random_tokens(3, 3 * WINDOW)
    with torch.inference_mode():
        expected = model(windows, output_hidden_states=True).hidden_states
        hidden = HiddenStates(model, family, windows, CPU, batch_tokens=6 * WINDOW)
        assert [len(batch) for batch in hidden.batches] == [2, 1]
        for index, layer in enumerate(model.get_submodule(family.layers)):
            torch.testing.assert_close(torch.cat(hidden.batches), expected[index], rtol=1e-5, atol=1e-5)
            hidden.advance(layer)
        normed = model.get_submodule(family.final_norm)(torch.cat(hidden.batches))
    torch.testing.assert_close(normed, expected[-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "opt"])
def test_a_half_precision_model_is_streamed_in_float32(name: str) -> None:
    model = tiny_model(name, torch.bfloat16)
    family = family_for(model.config)
    layers: Any = model.get_submodule(family.layers)
    norm = model.get_submodule(family.final_norm)
    with torch.inference_mode():
        assert embedded(model, family, random_tokens(2, 9)).dtype == torch.float32
        calls = layer_calls(model, family, random_tokens(1, 9), CPU)
    angles = [call.options.get("position_embeddings") for call in calls.values()]
    assert all(pair is None or pair[0].dtype == torch.float32 for pair in angles)
    assert list(calls) == list(layers)
    assert model.get_submodule(family.layers) is layers
    assert model.get_submodule(family.final_norm) is norm


@pytest.mark.parametrize("name", TINY)
def test_a_mask_that_is_written_out_changes_nothing(name: str) -> None:
    model = tiny_model(name)
    family = family_for(model.config)
    tokens = WINDOW - 1
    calls = layer_calls(model, family, random_tokens(1, tokens), CPU)
    masked = with_causal_masks(calls, tokens, CPU)
    assert all(call.options["attention_mask"] is not None for call in masked.values())
    with torch.inference_mode():
        hidden = embedded(model, family, random_tokens(2, tokens))
        for layer, call in calls.items():
            torch.testing.assert_close(masked[layer](layer, hidden), call(layer, hidden))


def test_layers_are_put_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    family = family_for(model.config)
    layers = model.get_submodule(family.layers)
    monkeypatch.setattr(model.model, "rotary_emb", nn.Identity())
    with pytest.raises(TypeError):
        embedded(model, family, random_tokens(1, 4))
    assert model.get_submodule(family.layers) is layers


def test_layers_called_with_one_mask_share_it() -> None:
    model = tiny_model("gemma2")
    with torch.inference_mode():
        calls = list(layer_calls(model, family_for(model.config), random_tokens(1, 20), CPU).values())
    masks = [call.options["attention_mask"] for call in calls]
    assert masks[0] is masks[2]
    assert masks[0] is not None
    assert masks[1] is not masks[0]
