"""The folder in which the commands of the docs are run."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from doc_runners import rrsq
from tiny_calibration import calibrate_tiny
from tiny_models import VOCABULARY_SIZE, make_text, save_tiny_model
from tiny_quantized import quantize_tiny, recipe_of, save_tiny

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HUB_MODELS = ("meta-llama/Meta-Llama-3-8B", "HuggingFaceTB/SmolLM2-135M")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Threads gain nothing on tiny models, and where the cores are busy they wait for each other: ten times
    as long for some of these commands."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _quickly() -> Iterator[None]:
    """On one thread; and what is imported by now is not searched when a command lets go of a model."""
    gc.freeze()
    with _one_thread():
        yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def documented(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast, tiny_task_hub: Path
) -> Path:
    """A folder with what the pages speak of: a model, its checkpoint, statistics, texts, a data root.

    Commands write elsewhere, so that their order does not matter.
    """
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("documented")
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        bos_token_id=tiny_tokenizer.bos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
    )
    with _one_thread():
        model = save_tiny_model(config, tiny_tokenizer, folder / "MODEL")
        checkpoint = save_tiny(quantize_tiny(model, recipe_of("rrs-w4a4kv4")), model, folder / "OUT")
        # Its channels are too few for the groups that can be exported.
        rotated = quantize_tiny(model, recipe_of("w4a16-rotated", ["weights.group_size=null"]))
        save_tiny(rotated, model, folder / "rotated")
        calibrate_tiny(model, folder / "calib")
    (folder / "model").symlink_to(model)
    (folder / "out").symlink_to(checkpoint)
    for name in HUB_MODELS:
        shutil.copytree(model, folder / "hub" / name)
    for data in tiny_task_hub.iterdir():
        (folder / "hub" / data.name).symlink_to(data)
    (folder / "notes.txt").write_text(make_text(300, seed=5))
    (folder / "mine.yaml").write_text(rrsq(["recipes", "rrs-w4a4kv4"]))
    return folder
