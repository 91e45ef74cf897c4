"""Shared fixtures: tiny random models, a tiny tokenizer, a text and a data folder, all made here.

Nothing in the test suite needs a network: the Hub libraries are told so before anything imports them.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tiny_models import VOCABULARY_SIZE, make_text, save_tiny_model
from tiny_quantized import quantize_tiny, recipe_of, save_tiny

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from rrsq.quantizer.pipeline import QuantizedModel

os.environ["HF_HUB_OFFLINE"] = "1"
# Triton reads this when it is imported, which transformers may do long before the kernels' tests are.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# rich reads it when rrsq's consoles are made, once for all tests of a process: wide enough for every table.
os.environ["COLUMNS"] = "300"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="rrsq-test-datasets-")
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UTF-8 text file of some 13000 tokens of the tiny tokenizer."""
    path = tmp_path_factory.mktemp("text") / "tiny.txt"
    path.write_text(make_text(1200, seed=1) + "\nNaïve café – 東京.\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer for any text, with fewer entries than the models have rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([make_text(800, seed=2)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        model_max_length=2048,
    )


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """Llama: tied embeddings, hidden 96 with 4 heads of 16 (their product is not the hidden size)."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=tiny_tokenizer.bos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    return save_tiny_model(config, tiny_tokenizer, tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_qwen2_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """Qwen2: untied embeddings, q/k/v biases (large on some keys), hidden 64, no head_dim in the config."""
    from transformers import Qwen2Config

    config = Qwen2Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=tiny_tokenizer.bos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    return save_tiny_model(config, tiny_tokenizer, tmp_path_factory.mktemp("models") / "tiny-qwen2")


WIKITEXT_CARD = """---
configs:
- config_name: wikitext-2-raw-v1
  data_files:
  - split: test
    path: wikitext-2-raw-v1/test-*.parquet
  - split: train
    path: wikitext-2-raw-v1/train-*.parquet
---
A text with the layout of the Hub data set of this name.
"""


@pytest.fixture(scope="session")
def tiny_hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root laid out like the Hub, holding a tiny ``Salesforce/wikitext`` with train and test."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = tmp_path_factory.mktemp("hub")
    folder = root / "Salesforce" / "wikitext"
    (folder / "wikitext-2-raw-v1").mkdir(parents=True)
    (folder / "README.md").write_text(WIKITEXT_CARD, encoding="utf-8")
    for split, seed in (("train", 3), ("test", 4)):
        rows = ["", " = Title = \n", *make_text(400, seed).split("\n"), ""]
        file = folder / "wikitext-2-raw-v1" / f"{split}-00000-of-00001.parquet"
        pq.write_table(pa.table({"text": rows}), file)
    return root


@pytest.fixture(scope="session")
def tiny_task_hub(tiny_hub: Path) -> Path:
    """The same data root with tiny zero-shot tasks in it; see :func:`tiny_tasks.write_task_data`."""
    from tiny_tasks import write_task_data

    write_task_data(tiny_hub)
    return tiny_hub


@pytest.fixture(scope="session")
def quantized_qwen2(tiny_qwen2_dir: Path) -> QuantizedModel:
    """The tiny Qwen2 with the default recipe; not to be changed."""
    return quantize_tiny(tiny_qwen2_dir, recipe_of("rrs-w4a4kv4"))


@pytest.fixture(scope="session")
def qwen2_checkpoint(
    quantized_qwen2: QuantizedModel, tiny_qwen2_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A checkpoint in one file; not to be changed."""
    return save_tiny(quantized_qwen2, tiny_qwen2_dir, tmp_path_factory.mktemp("one") / "out")


@pytest.fixture(scope="session")
def fully_rotated_checkpoint(tiny_qwen2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of the first generation, whose rotation of ``down`` mixes all channels; not to be changed."""
    quantized = quantize_tiny(tiny_qwen2_dir, recipe_of("rrs1-w4a4kv4"))
    return save_tiny(quantized, tiny_qwen2_dir, tmp_path_factory.mktemp("rotated") / "out")


@pytest.fixture(scope="session")
def sharded_checkpoint(
    quantized_qwen2: QuantizedModel, tiny_qwen2_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same in several shards; not to be changed."""
    out = tmp_path_factory.mktemp("sharded") / "out"
    return save_tiny(quantized_qwen2, tiny_qwen2_dir, out, max_shard_size="30KB")


@pytest.fixture
def damaged(qwen2_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint in one file, to be damaged."""
    return shutil.copytree(qwen2_checkpoint, tmp_path / "damaged")


@pytest.fixture
def damaged_shards(sharded_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the sharded checkpoint, to be damaged."""
    return shutil.copytree(sharded_checkpoint, tmp_path / "damaged-shards")
