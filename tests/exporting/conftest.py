"""Checkpoints of a tiny model by recipes that can be exported."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tiny_models import VOCABULARY_SIZE, save_tiny_model
from tiny_quantized import quantize_tiny, recipe_of, save_tiny

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Make = Callable[..., Path]


@pytest.fixture(scope="session")
def exportable_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """Llama with biases and a tied head; 128 and 192 channels, so that groups are of two sizes."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        attention_bias=True,
        max_position_embeddings=256,
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    return save_tiny_model(config, tiny_tokenizer, tmp_path_factory.mktemp("models") / "exportable")


@pytest.fixture(scope="session")
def make(exportable_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Quantizes it by a recipe; the same call gives the same folder."""
    made: dict[tuple[str, tuple[str, ...]], Path] = {}

    def checkpoint(recipe: str = "w4a16-rotated", overrides: Iterable[str] = ()) -> Path:
        key = recipe, tuple(overrides)
        if key not in made:
            quantized = quantize_tiny(exportable_dir, recipe_of(recipe, overrides))
            made[key] = save_tiny(quantized, exportable_dir, tmp_path_factory.mktemp("checkpoint") / "out")
        return made[key]

    return checkpoint
