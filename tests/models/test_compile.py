"""``torch.compile(model.forward, fullgraph=True)`` of a prompt and of a decode step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from rrsq.quantizer.pipeline import quantize_model
from rrsq.runtime.ready import make_ready
from tiny_families import tiny_model
from tiny_quantized import random_tokens, recipe_of


@pytest.fixture(autouse=True)
def _traced_anew() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def ready(name: str, *overrides: str) -> Any:
    windows = random_tokens(2, 16, seed=1)
    model = quantize_model(tiny_model(name), recipe_of("rrs-w4a4kv4", overrides), windows).model.eval()
    make_ready(model)
    return model


@torch.no_grad()
def logits_of(model: Any, forward: Any, tokens: Tensor) -> Tensor:
    """Of a prompt and a step behind it."""
    cache = DynamicCache(config=model.config)
    parts = [
        forward(input_ids=tokens[:, first:last], past_key_values=cache).logits
        for first, last in ((0, 6), (6, 7))
    ]
    return torch.cat(parts, 1)


# Tracing takes some ten seconds a family: one of each kind of attention and of MLP.
@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_a_forward_pass_is_one_graph(name: str) -> None:
    model = ready(name)
    tokens = random_tokens(1, 7)
    expected = logits_of(model, model.forward, tokens)
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    logits = logits_of(model, compiled, tokens)
    assert float((logits - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("bits", [8, 4])
def test_an_embedding_and_the_head_that_shares_it_are_in_the_graph(bits: int) -> None:
    model = ready("gemma3_text", f"embedding.bits={bits}")
    assert type(model.lm_head).__name__ == "SharedHead"
    tokens = random_tokens(1, 7)
    expected = logits_of(model, model.forward, tokens)
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    logits = logits_of(model, compiled, tokens)
    assert float((logits - expected).norm() / expected.norm()) < 0.02
