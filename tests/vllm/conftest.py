"""Checkpoints of tiny models, made once for all tests of vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rrsq.quantizer.pipeline import needs_calibration, quantize_model
from rrsq.quantizer.production.writer import checkpoint_info
from tiny_families import random_model
from tiny_quantized import random_tokens, recipe_of, save_quantized

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

Make = Callable[..., Path]
OF_THE_FIRST = ("scales: real", "inputs:", "rotation.shards")


@pytest.fixture(scope="session")
def make(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Quantizes a random model of a configuration by a recipe; the same call gives the same folder.

    The recipe is the default, or, for options that it cannot have, that of the first generation.
    """
    made: dict[Any, Path] = {}

    def checkpoint(
        name: str, config: PretrainedConfig, overrides: Iterable[str] = (), recipe: str | None = None
    ) -> Path:
        if recipe is None:
            first = any(option in text for option in OF_THE_FIRST for text in overrides)
            recipe = "rrs1-w4a4kv4" if first else "rrs-w4a4kv4"
        key = name, recipe, tuple(overrides)
        if key not in made:
            chosen = recipe_of(recipe, overrides)
            windows = random_tokens(3, 24, seed=1) if needs_calibration(chosen) else None
            quantized = quantize_model(random_model(config), chosen, windows)
            info = checkpoint_info(quantized, seed=0, source_model=name, calibration=None)
            out = tmp_path_factory.mktemp("checkpoint") / "out"
            made[key] = save_quantized(quantized, tiny_tokenizer, info, out)
        return made[key]

    return checkpoint
