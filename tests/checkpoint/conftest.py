"""One quantized tiny model and its checkpoint, shared by the tests of this folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tiny_quantized import quantize_tiny, recipe_of, save_tiny

if TYPE_CHECKING:
    from rrsq.quantization.pipeline import QuantizedModel


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
def sharded_checkpoint(
    quantized_qwen2: QuantizedModel, tiny_qwen2_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same in several shards; not to be changed."""
    out = tmp_path_factory.mktemp("sharded") / "out"
    return save_tiny(quantized_qwen2, tiny_qwen2_dir, out, max_shard_size="60KB")


@pytest.fixture
def damaged(qwen2_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint in one file, to be damaged."""
    return shutil.copytree(qwen2_checkpoint, tmp_path / "damaged")


@pytest.fixture
def damaged_shards(sharded_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the sharded checkpoint, to be damaged."""
    return shutil.copytree(sharded_checkpoint, tmp_path / "damaged-shards")
