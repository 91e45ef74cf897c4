"""Every family with every recipe: quantize, save, load, generate, evaluate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import rrsq
from rrsq.evaluation.perplexity import perplexity
from rrsq.quantization.pipeline import needs_calibration, quantize_model
from rrsq.recipe import recipe_names
from tiny_families import TINY, WINDOW, tiny_model
from tiny_quantized import logits_of, random_tokens, recipe_of, save_tiny

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@pytest.mark.parametrize("recipe_name", recipe_names())
@pytest.mark.parametrize("name", TINY)
def test_every_recipe(
    name: str, recipe_name: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    recipe = recipe_of(recipe_name)
    windows = random_tokens(3, 24, seed=1) if needs_calibration(recipe) else None
    original = tiny_model(name)
    original.save_pretrained(tmp_path / "source")
    tiny_tokenizer.save_pretrained(tmp_path / "source")
    quantized = quantize_model(original, recipe, windows)
    assert quantized.report.fallbacks == []
    model = rrsq.load(str(save_tiny(quantized, tmp_path / "source", tmp_path / "out")), device="cpu")
    tokens = random_tokens(1, 2 * WINDOW, seed=2)
    logits = logits_of(model, tokens)
    assert torch.equal(logits, logits_of(quantized.model, tokens))

    generated = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, min_new_tokens=4, do_sample=False
    )
    assert generated.shape == (1, 2 * WINDOW + 4)
    loss = torch.nn.functional.cross_entropy(logits[0, :-1].double(), tokens[0, 1:])
    assert perplexity(model, tokens).perplexity == pytest.approx(math.exp(loss), rel=1e-4)
