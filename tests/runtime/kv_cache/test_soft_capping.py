"""Attention with soft-capped logits (Gemma 2), which transformers' ``sdpa`` has not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from rrsq.quantizer.pipeline import quantize_model
from rrsq.runtime.decoding import attach_decoder
from rrsq.runtime.kv_cache import attention
from rrsq.runtime.kv_cache.attention import ATTENTION
from rrsq.runtime.kv_cache.quantizer import KVQuantizer
from tiny_families import tiny_model
from tiny_quantized import logits_of, random_tokens, recipe_of


@pytest.fixture
def model() -> Any:
    model = quantize_model(tiny_model("gemma2"), recipe_of("w16a16kv4"), random_tokens(2, 16)).model.eval()
    attach_decoder(model)
    return model


@pytest.fixture
def codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU what a GPU does, by the operations' references."""

    def reads_codes(self: KVQuantizer, device: torch.device) -> bool:
        return self._config._attn_implementation == ATTENTION

    monkeypatch.setattr(KVQuantizer, "reads_codes", reads_codes)


def continued(model: Any, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Of a prompt, several tokens and one."""
    cache = DynamicCache(config=model.config)
    parts = []
    for first, last in ((0, 20), (20, 23), (23, 24)):
        given = {} if mask is None else {"attention_mask": mask[:, :last]}
        parts.append(logits_of(model, tokens[:, first:last], past_key_values=cache, **given))
    return torch.cat(parts, 1)


@pytest.mark.parametrize("padded", [False, True])
def test_on_a_cpu_it_gives_the_bits_of_eager(model: Any, padded: bool) -> None:
    tokens = random_tokens(2, 24)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    assert model.config._attn_implementation == ATTENTION
    ours = continued(model, tokens, mask if padded else None)
    model.set_attn_implementation("eager")
    assert torch.equal(ours, continued(model, tokens, mask if padded else None))


@pytest.mark.usefixtures("codes")
@pytest.mark.parametrize("logits", [1, 2**28])
def test_codes_are_attended_to(model: Any, logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a query at a time, where more logits would not fit."""
    monkeypatch.setattr(attention, "_MOST_LOGITS", logits)
    tokens = random_tokens(2, 24)
    ours = continued(model, tokens)
    model.set_attn_implementation("eager")
    expected = continued(model, tokens)
    assert float((ours - expected).norm() / expected.norm()) < 0.02


@pytest.mark.usefixtures("codes")
def test_weights_that_are_asked_for(model: Any) -> None:
    tokens = random_tokens(1, 12)
    ours = model(tokens, past_key_values=DynamicCache(config=model.config), output_attentions=True)
    model.set_attn_implementation("eager")
    expected = model(tokens, past_key_values=DynamicCache(config=model.config), output_attentions=True)
    for weights, of_eager in zip(ours.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(weights, of_eager, rtol=0, atol=1e-2)


class Manager:
    def __init__(self, implementation: str) -> None:
        self.implementation = implementation

    def stop(self) -> None:
        pass


def test_continuous_batching_gets_transformers_own(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        type(model),
        "init_continuous_batching",
        lambda model, *args: Manager(model.config._attn_implementation),
    )
    with pytest.warns(UserWarning, match="stays in 16 bits"):
        manager = model.init_continuous_batching()
    assert manager.implementation == "eager"
    manager.stop()
    assert model.config._attn_implementation == ATTENTION
