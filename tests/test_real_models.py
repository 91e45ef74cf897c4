"""The spine on real models, with real text: ``make test-real`` runs this, in some minutes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import rrsq
from rrsq.evaluation.perplexity import perplexity
from rrsq.models import ModelSizes, family_for
from rrsq.quantizer.calibration.text import load_documents
from rrsq.quantizer.calibration.windows import calibration_windows, data_fingerprint, evaluation_windows
from rrsq.quantizer.fold.rotations import rotate_model
from rrsq.quantizer.pipeline import quantize_model
from rrsq.quantizer.production.writer import checkpoint_info
from rrsq.recipe import Rotation, load_recipe
from rrsq.runtime.format.format import CalibrationInfo
from rrsq.runtime.format.loading import load_model, load_tokenizer
from rrsq.runtime.rotation.rotations import make_rotations
from tiny_quantized import save_quantized

pytestmark = pytest.mark.real

PROMPT = "The river Thames flows through London and"
SAMPLES, LENGTH = 4, 256


def real_model(name: str) -> str:
    root = os.environ.get("RRSQ_TEST_MODELS")
    if not root:
        pytest.skip(f"needs the real model {name}: 'make test-real' sets RRSQ_TEST_MODELS")
    if not (Path(root) / name / "config.json").is_file():
        pytest.skip(f"needs the real model {name}: there is no {root}/{name}")
    return str(Path(root) / name)


@pytest.fixture(scope="module")
def wikitext() -> dict[str, list[str]]:
    """Training and test documents of WikiText-2."""
    root = os.environ.get("RRSQ_DATA_ROOT")
    if not root:
        pytest.skip("needs WikiText-2 under a data root: 'make test-real' passes RRSQ_DATA_ROOT on")
    return {
        split: load_documents("wikitext2", split=split, data_root=Path(root)) for split in ("train", "test")
    }


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-coder-0.5b"])
def test_rotation_leaves_the_logits_alone(name: str) -> None:
    path = real_model(name)
    model: Any = load_model(path, device="cpu", dtype="float32")
    tokens = load_tokenizer(path)(PROMPT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        before = model(tokens).logits.double()
        sizes = ModelSizes.from_config(model.config)
        rotations = make_rotations(Rotation(), sizes, seed=0)
        rotate_model(model, family_for(model.config), rotations, sizes)
        after = model(tokens).logits.double()
    assert float((after - before).norm() / before.norm()) < 1e-5


def test_the_default_recipe_keeps_smollm2_useful(wikitext: dict[str, list[str]], tmp_path: Path) -> None:
    path = real_model("smollm2-135m")
    tokenizer = load_tokenizer(path)
    test_windows = evaluation_windows(tokenizer, wikitext["test"], 512, limit=2)
    model = load_model(path, device="cpu", dtype="float32")
    before = perplexity(model, test_windows).perplexity

    windows = calibration_windows(tokenizer, wikitext["train"], SAMPLES, LENGTH, seed=0)
    recipe = load_recipe("rrs-w4a4kv4")
    quantized = quantize_model(model, recipe, windows)
    assert quantized.report.fallbacks == []
    calibration = CalibrationInfo(
        source="wikitext2",
        num_samples=SAMPLES,
        sequence_length=LENGTH,
        fingerprint=data_fingerprint(windows),
    )
    info = checkpoint_info(quantized, seed=0, source_model="smollm2-135m", calibration=calibration)
    save_quantized(quantized, tokenizer, info, tmp_path / "out")
    del model, quantized

    loaded: Any = rrsq.load(str(tmp_path / "out"), device="cpu")
    after = perplexity(loaded, test_windows).perplexity
    assert before < after < 2 * before

    prompt = load_tokenizer(str(tmp_path / "out"))(PROMPT, return_tensors="pt")
    generated = loaded.generate(**prompt, max_new_tokens=16, min_new_tokens=16, do_sample=False)
    new = generated[0, prompt["input_ids"].shape[1] :]
    assert new.numel() == 16
    assert len(set(new.tolist())) > 4
