"""Writing a checkpoint: whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

import rrsq
from rrsq.errors import OutputExistsError, StorageError
from rrsq.quantizer.pipeline import QuantizedModel
from rrsq.runtime.format.loading import load_tokenizer
from rrsq.storage import check_output
from tiny_quantized import load_tiny, logits_of, quantize_tiny, random_tokens, recipe_of, save_tiny


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_holds_what_a_hugging_face_folder_holds(qwen2_checkpoint: Path) -> None:
    names = {path.name for path in qwen2_checkpoint.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    config = json.loads((qwen2_checkpoint / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "rrsq"
    assert quantization["format_version"] == 2
    assert quantization["recipe"] == recipe_of("rrs-w4a4kv4").model_dump(mode="json")
    assert quantization["rotation"]["residual"] == {"size": 64, "block": 64, "base": 1}
    assert quantization["rotation"]["intermediate"]["size"] == 96
    assert quantization["key_bits"] == [4, 4]
    assert "torch" in quantization["versions"]


def test_the_model_card_says_what_was_done(qwen2_checkpoint: Path) -> None:
    card = (qwen2_checkpoint / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    for text in ("tiny-qwen2", "rrs-w4a4kv4", "import rrsq", "from_pretrained", "random tokens", "INT4"):
        assert text in card


def test_tensors_have_the_designed_names_shapes_and_dtypes(qwen2_checkpoint: Path) -> None:
    tensors = load_file(qwen2_checkpoint / "model.safetensors")
    down = "model.layers.1.mlp.down_proj."
    assert tensors[down + "weight_packed"].shape == (64, 48)
    assert tensors[down + "weight_packed"].dtype == torch.uint8
    assert tensors[down + "weight_scale"].shape == (64,)
    assert tensors[down + "weight_scale"].dtype == torch.float32
    assert tensors[down + "weight_multiplier"].shape == (64, 3)
    assert tensors[down + "weight_multiplier"].dtype == torch.uint8
    assert down + "weight" not in tensors
    assert tensors["model.layers.0.self_attn.q_proj.bias"].shape == (64,)
    assert tensors["model.layers.0.self_attn.kv_quantizer.keys.offset"].shape == (2, 16)
    assert tensors["rotation_signs.residual_signs"].shape == (64,)
    assert tensors["rotation_signs.residual_signs"].dtype == torch.int8
    assert set(tensors["rotation_signs.head_signs"].tolist()) == {-1, 1}


def test_shards_hold_the_same_tensors(qwen2_checkpoint: Path, sharded_checkpoint: Path) -> None:
    shards = sorted(sharded_checkpoint.glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((sharded_checkpoint / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    together = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    alone = load_file(qwen2_checkpoint / "model.safetensors")
    assert together.keys() == alone.keys() == index["weight_map"].keys()
    assert all(torch.equal(together[name], tensor) for name, tensor in alone.items())


def test_a_sharded_checkpoint_loads(sharded_checkpoint: Path, quantized_qwen2: QuantizedModel) -> None:
    tokens = random_tokens(1, 12)
    expected = logits_of(quantized_qwen2.model, tokens)
    assert torch.equal(logits_of(rrsq.load(str(sharded_checkpoint)), tokens), expected)


def test_quantizing_twice_gives_the_same_bytes(
    qwen2_checkpoint: Path, tiny_qwen2_dir: Path, tmp_path: Path
) -> None:
    again = quantize_tiny(tiny_qwen2_dir, recipe_of("rrs-w4a4kv4"))
    out = save_tiny(again, tiny_qwen2_dir, tmp_path / "again")
    first, second = everything_in(qwen2_checkpoint), everything_in(out)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_an_existing_output_is_refused_and_left_alone(
    quantized_qwen2: QuantizedModel, tiny_qwen2_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(OutputExistsError, match="exists already") as caught:
        save_tiny(quantized_qwen2, tiny_qwen2_dir, out)
    assert caught.value.exit_code == 2
    assert everything_in(tmp_path) == {"out/config.json": b"{}"}


def test_overwriting_replaces_the_whole_folder(
    quantized_qwen2: QuantizedModel, qwen2_checkpoint: Path, tiny_qwen2_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}", encoding="utf-8")
    (out / "model-00001-of-00002.safetensors").write_bytes(b"old")
    save_tiny(quantized_qwen2, tiny_qwen2_dir, out, overwrite=True)
    assert everything_in(out) == everything_in(qwen2_checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_is_no_model_is_never_replaced(
    quantized_qwen2: QuantizedModel, tiny_qwen2_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "home"
    out.mkdir()
    (out / "thesis.txt").write_text("dear", encoding="utf-8")
    with pytest.raises(OutputExistsError, match="is not a model folder"):
        save_tiny(quantized_qwen2, tiny_qwen2_dir, out, overwrite=True)
    file = tmp_path / "file"
    file.write_text("x", encoding="utf-8")
    with pytest.raises(OutputExistsError, match="is not a model folder"):
        save_tiny(quantized_qwen2, tiny_qwen2_dir, file, overwrite=True)
    assert everything_in(tmp_path) == {"home/thesis.txt": b"dear", "file": b"x"}


def test_an_empty_folder_may_be_overwritten(
    quantized_qwen2: QuantizedModel, tiny_qwen2_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    save_tiny(quantized_qwen2, tiny_qwen2_dir, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "config.json").is_file()


def test_checking_leaves_nothing_but_the_parent(tmp_path: Path) -> None:
    check_output(tmp_path / "a" / "b" / "out", overwrite=False)
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b"]


def test_a_parent_that_is_a_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(StorageError, match="cannot be written"):
        check_output(tmp_path / "file" / "out", overwrite=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="needs an ordinary user: root may write anywhere")
def test_a_parent_without_permission_is_one_clear_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="cannot be written: Permission denied"):
        check_output(tmp_path / "out", overwrite=False)


class Failing:
    """``save_pretrained`` that writes a little and then fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
        self.error = error
        monkeypatch.setattr(PreTrainedModel, "save_pretrained", self.save)

    def save(self, folder: Path, **kwargs: Any) -> None:
        (Path(folder) / "model-00001-of-00002.safetensors").write_bytes(b"half")
        raise self.error


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FULL, "disk that holds '.*out' is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "disk that holds '.*out' is full"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "cannot be written: Read-only file system"),
    ],
)
def test_a_failure_midway_leaves_nothing(
    quantized_qwen2: QuantizedModel,
    tiny_qwen2_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    message: str,
) -> None:
    Failing(monkeypatch, error)
    with pytest.raises(StorageError, match=message) as caught:
        save_tiny(quantized_qwen2, tiny_qwen2_dir, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()])
def test_a_failure_while_overwriting_keeps_the_old(
    quantized_qwen2: QuantizedModel,
    qwen2_checkpoint: Path,
    tiny_qwen2_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    out = shutil.copytree(qwen2_checkpoint, tmp_path / "out")
    Failing(monkeypatch, error)
    with pytest.raises((StorageError, KeyboardInterrupt)):
        save_tiny(quantized_qwen2, tiny_qwen2_dir, out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert everything_in(out) == everything_in(qwen2_checkpoint)


def test_a_failing_rename_puts_the_old_back(
    quantized_qwen2: QuantizedModel,
    qwen2_checkpoint: Path,
    tiny_qwen2_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = shutil.copytree(qwen2_checkpoint, tmp_path / "out")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if "partial" in self.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(StorageError, match="Input/output error"):
        save_tiny(quantized_qwen2, tiny_qwen2_dir, out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert everything_in(out) == everything_in(qwen2_checkpoint)


def test_an_error_that_is_no_storage_error_is_not_hidden(
    quantized_qwen2: QuantizedModel, tiny_qwen2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Failing(monkeypatch, ValueError("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        save_tiny(quantized_qwen2, tiny_qwen2_dir, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_with_several_chat_templates_is_written(
    quantized_qwen2: QuantizedModel, tiny_qwen2_dir: Path, tmp_path: Path
) -> None:
    """Such a tokenizer saves a folder of templates beside its files."""
    source = shutil.copytree(tiny_qwen2_dir, tmp_path / "tiny-qwen2")
    tokenizer = load_tokenizer(str(source))
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(source)
    out = save_tiny(quantized_qwen2, source, tmp_path / "out")
    assert load_tokenizer(str(out)).chat_template == tokenizer.chat_template


def test_writing_does_not_change_what_the_model_computes(tiny_llama_dir: Path, tmp_path: Path) -> None:
    quantized = quantize_tiny(tiny_llama_dir, recipe_of("rrs-w4a4kv4"))
    tokens = random_tokens(1, 12)
    before = logits_of(quantized.model, tokens)
    save_tiny(quantized, tiny_llama_dir, tmp_path / "out")
    assert torch.equal(logits_of(quantized.model, tokens), before)
    assert logits_of(load_tiny(tiny_llama_dir), tokens).shape == before.shape
