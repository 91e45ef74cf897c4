"""A fingerprint tells models apart, and copies of one not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from rrsq.quantizer.calibration.fingerprint import model_fingerprint
from tiny_quantized import load_tiny


def test_a_copy_elsewhere_is_the_same_model(tiny_llama_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_llama_dir, tmp_path / "copy")
    assert model_fingerprint(load_tiny(copy)) == model_fingerprint(load_tiny(tiny_llama_dir))


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.2.mlp.down_proj.weight"])
def test_one_changed_number_is_another_model(tiny_llama_dir: Path, name: str) -> None:
    model = load_tiny(tiny_llama_dir)
    before = model_fingerprint(model)
    with torch.no_grad():
        weight = model.get_parameter(name)
        weight[-1, -1] = torch.nextafter(weight[-1, -1], torch.tensor(torch.inf))
    after = model_fingerprint(model)
    assert after.weights != before.weights
    assert after.config == before.config


def test_another_precision_is_another_model(tiny_llama_dir: Path) -> None:
    exact = model_fingerprint(load_tiny(tiny_llama_dir, "float32"))
    rounded = model_fingerprint(load_tiny(tiny_llama_dir, "bfloat16"))
    assert exact.weights != rounded.weights


def test_a_field_that_changes_what_is_computed_changes_the_configuration(tiny_llama_dir: Path) -> None:
    model = load_tiny(tiny_llama_dir)
    before = model_fingerprint(model)
    model.config.rms_norm_eps *= 2
    after = model_fingerprint(model)
    assert after.config != before.config
    assert after.weights == before.weights
