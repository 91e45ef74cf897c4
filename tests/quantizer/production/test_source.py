"""Opening a model that is to be quantized: which files are read, and where its activations may lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from safetensors.torch import load_file, save_file

from killed_run import produce
from rrsq.errors import CheckpointError, StorageError
from rrsq.quantizer.calibration.fingerprint import model_fingerprint
from rrsq.quantizer.production.source import open_model
from tiny_quantized import load_tiny


def sharded(model: Path, folder: Path) -> Path:
    """A copy in two shards with an index."""
    folder.mkdir()
    weights = load_file(model / "model.safetensors")
    names = sorted(weights)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: weights[name] for name in own}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, own in parts.items() for name in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for path in model.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_of_a_hub_model_only_the_shards_of_its_index_are_fetched(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sharded(tiny_llama_dir, tmp_path / "model")
    asked: list[list[str]] = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr("rrsq.quantizer.production.source.load_config", lambda model, root: config_of(folder))
    monkeypatch.setattr(
        "rrsq.quantizer.production.source.locate_model", lambda model, root: ("some-org/model", {})
    )
    opened = open_model("some-org/model")
    assert asked == [["*.json"], ["*.json", "a.safetensors", "b.safetensors"]]
    assert opened.fingerprint.weights == open_model(str(tiny_llama_dir)).fingerprint.weights


def config_of(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("name", [5, "../b.safetensors", "/etc/passwd"])
def test_an_index_that_names_no_file_of_the_folder_is_refused(
    name: object, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    folder = sharded(tiny_llama_dir, tmp_path / "model")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(CheckpointError, match="is no safetensors file of the folder itself"):
        open_model(str(folder))


def test_a_model_is_the_same_by_its_shards_and_as_it_is_loaded(
    tiny_llama_dir: Path, tiny_qwen2_dir: Path
) -> None:
    """Else ``rrsq quantize`` would refuse what ``rrsq calibrate``, which loads the model, has stored."""
    tied = set()
    for folder in (tiny_llama_dir, tiny_qwen2_dir):
        opened = open_model(str(folder))
        assert opened.folder == folder
        assert opened.fingerprint == model_fingerprint(load_tiny(folder))
        tied.add(opened.model.config.tie_word_embeddings)
    assert tied == {False, True}


def test_activations_in_a_folder_change_no_byte(tiny_llama_dir: Path, tmp_path: Path) -> None:
    offload = tmp_path / "offload"
    produce(tiny_llama_dir, tmp_path / "memory")
    produce(tiny_llama_dir, tmp_path / "file", offload=offload)
    assert offload.is_dir()
    assert list(offload.iterdir()) == []
    for path in (tmp_path / "memory").glob("*.safetensors"):
        assert (tmp_path / "file" / path.name).read_bytes() == path.read_bytes()


def test_a_folder_for_activations_that_is_a_file_is_named(tiny_llama_dir: Path, tmp_path: Path) -> None:
    offload = tmp_path / "offload"
    offload.touch()
    with pytest.raises(StorageError, match="offload' cannot be written"):
        produce(tiny_llama_dir, tmp_path / "out", offload=offload)
    assert not (tmp_path / "out").exists()
