"""The descriptions of models that vLLM is timed with, and what is said where it is not there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rrsq.benchmarking.serving import CONTENDERS, Load, describe, fill, measure_in_process
from rrsq.errors import UsageError
from rrsq.runtime.format.format import parse_info
from rrsq.runtime.format.validate import check_description
from tiny_families import TINY
from tiny_quantized import recipe_of

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", TINY)
def test_a_description_is_that_of_a_checkpoint(name: str) -> None:
    config = TINY[name]()
    described = describe(config, recipe_of("rrs-w4a4kv4", ["head.bits=8"]))
    check_description(config, parse_info(described["quantization_config"]))
    assert described["tie_word_embeddings"] is False
    assert type(config)(**described).get_text_config().hidden_size == config.get_text_config().hidden_size


def test_a_tied_head_that_nothing_changes_stays_tied() -> None:
    config = TINY["qwen2"]()
    assert config.tie_word_embeddings
    assert describe(config, recipe_of("gptq-w4a16"))["tie_word_embeddings"]


def test_integers_become_random_and_numbers_stay_in_range() -> None:
    model = torch.nn.Module()
    model.weight_packed = torch.nn.Parameter(torch.zeros(64, 32, dtype=torch.uint8), requires_grad=False)
    model.register_buffer("weight_multiplier", torch.zeros(64, 4, dtype=torch.uint8))
    model.register_buffer("weight_scale", torch.full((64,), float("nan")))
    model.register_buffer("positions", torch.zeros(8, dtype=torch.int64))
    assert fill(model) == 64 * 32 + 64 * 4 + 64 * 4 + 8 * 8
    assert len(model.weight_packed.unique()) > 200
    assert set(model.weight_multiplier.unique().tolist()) == set(range(1, 16))
    assert (model.weight_scale > 0).all()
    assert not model.positions.any()


@pytest.mark.parametrize("name", CONTENDERS)
def test_what_went_wrong_is_said(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    with pytest.raises(UsageError, match=f"{name} did not run in vLLM: "):
        measure_in_process(name, {"model_type": "no such model"}, [Load(1, 8)], {})


@pytest.mark.parametrize("script", ["serving_speed", "serving_parity"])
def test_the_examples_explain_themselves(script: str) -> None:
    words = [sys.executable, str(ROOT / "examples" / f"{script}.py"), "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "vLLM" in done.stdout
