"""Every family with every recipe: quantize, save, load, generate, evaluate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import rrsq
from rrsq.evaluation.perplexity import perplexity
from rrsq.quantizer.calibration.windows import data_fingerprint
from rrsq.quantizer.pipeline import needs_calibration, quantize_model
from rrsq.quantizer.production.produce import Calibration, OutputOptions, SourceModel, produce_checkpoint
from rrsq.recipe import recipe_names
from rrsq.runtime.format.format import CalibrationInfo
from rrsq.runtime.format.loading import load_tokenizer
from tiny_families import TINY, WINDOW, tiny_model
from tiny_quantized import logits_of, random_tokens, recipe_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from rrsq.quantizer.outcome import QuantizationReport
    from rrsq.recipe import Recipe

WINDOWS = random_tokens(3, 24, seed=1)


@pytest.fixture(scope="module", params=TINY)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def source(
    name: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The family's model as the Hub has it, in several shards."""
    folder = tmp_path_factory.mktemp("source") / "tiny"
    tiny_model(name).save_pretrained(folder, max_shard_size="60KB")
    tiny_tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


LIKE_LLAMA = ("arcee", "exaone4", "granite", "olmo3", "seed_oss", "smollm3", "starcoder2")
THEIR_RECIPES = ("rrs-w4a4kv4", "rrs1-w4a4kv4", "gptq-w4a16")


def produce(source: Path, recipe: Recipe, out: Path) -> QuantizationReport:
    """What ``rrsq quantize`` does, with random tokens: shards in, shards out, a layer at a time."""
    calibration = None
    if needs_calibration(recipe):
        samples, length = WINDOWS.shape
        fingerprint = data_fingerprint(WINDOWS)
        info = CalibrationInfo(
            source="random tokens", num_samples=samples, sequence_length=length, fingerprint=fingerprint
        )
        calibration = Calibration(WINDOWS, info)
    notes: list[str] = []
    options = OutputOptions(out, max_shard_size="40KB")
    model = SourceModel(str(source), load_tokenizer(str(source)))
    produced = produce_checkpoint(model, recipe, options, calibration, on_note=notes.append)
    assert not any("loaded as a whole" in note for note in notes)
    return produced.report


@pytest.mark.parametrize("recipe_name", recipe_names())
def test_every_recipe(name: str, recipe_name: str, source: Path, tmp_path: Path) -> None:
    if name in LIKE_LLAMA and recipe_name not in THEIR_RECIPES:
        pytest.skip("other families show what this recipe does")
    recipe = recipe_of(recipe_name)
    report = produce(source, recipe, tmp_path / "out")
    assert report.fallbacks == []
    model = rrsq.load(str(tmp_path / "out"), device="cpu")
    tokens = random_tokens(1, 2 * WINDOW, seed=2)
    logits = logits_of(model, tokens)

    whole = quantize_model(tiny_model(name), recipe, WINDOWS if needs_calibration(recipe) else None).model
    loaded, expected = model.state_dict(), whole.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.items())
    assert torch.equal(logits, logits_of(whole, tokens))

    generated = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, min_new_tokens=4, do_sample=False
    )
    assert generated.shape == (1, 2 * WINDOW + 4)
    loss = torch.nn.functional.cross_entropy(logits[0, :-1].double(), tokens[0, 1:])
    assert perplexity(model, tokens).perplexity == pytest.approx(math.exp(loss), rel=1e-4)
