"""A damaged checkpoint is one clear error, whichever way it is loaded."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import rrsq
from rrsq.errors import CheckpointError, ModelLoadError
from rrsq.runtime.format.format import parse_info
from rrsq.runtime.format.shards import read_header

PACKED = "model.layers.0.mlp.up_proj.weight_packed"


@pytest.fixture(params=["rrsq.load", "from_pretrained"])
def load(request: pytest.FixtureRequest) -> Callable[[Path], Any]:
    if request.param == "rrsq.load":
        return lambda folder: rrsq.load(str(folder))
    return lambda folder: AutoModelForCausalLM.from_pretrained(folder)


def refuse(load: Callable[[Path], Any], folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    change(config["quantization_config"])
    file.write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("keep", [0, 5, 100, -1, -1000])
def test_a_truncated_file(load: Callable[[Path], Any], damaged: Path, keep: int) -> None:
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep] if keep else b"")
    refuse(load, damaged, r"model\.safetensors is damaged")


def test_a_truncated_shard_is_named(load: Callable[[Path], Any], damaged_shards: Path) -> None:
    shard = sorted(damaged_shards.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-7])
    refuse(load, damaged_shards, f"{shard.name} is damaged: .* bytes where its header describes")


def test_a_missing_shard_is_named(load: Callable[[Path], Any], damaged_shards: Path) -> None:
    shard = sorted(damaged_shards.glob("*.safetensors"))[1]
    shard.unlink()
    refuse(load, damaged_shards, shard.name)


def test_a_file_that_is_no_safetensors_file(load: Callable[[Path], Any], damaged: Path) -> None:
    (damaged / "model.safetensors").write_bytes(b"<html>Not found</html>" * 10)
    refuse(load, damaged, "is no safetensors file")


def test_a_missing_tensor(load: Callable[[Path], Any], damaged: Path) -> None:
    change_tensors(damaged, lambda tensors: tensors.pop(PACKED))
    refuse(load, damaged, f"lacks the tensor '{PACKED}'")


def test_many_missing_tensors_are_counted(load: Callable[[Path], Any], damaged: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "layers.1" in name]:
            del tensors[name]

    refuse_message = r"lacks the tensor 'model\.layers\.1\..*' and \d+ more"
    change_tensors(damaged, change)
    refuse(load, damaged, refuse_message)


def test_a_wrong_shape(load: Callable[[Path], Any], damaged: Path) -> None:
    change_tensors(damaged, lambda tensors: tensors.update({PACKED: tensors[PACKED][:, :-1].contiguous()}))
    refuse(load, damaged, rf"'{PACKED}' of the checkpoint has shape \[96, 31\]; its recipe needs \[96, 32\]")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (PACKED, torch.int8),
        (PACKED, torch.float32),
        ("model.layers.0.mlp.up_proj.weight_scale", torch.int32),
        ("rotation_signs.head_signs", torch.float16),
    ],
)
def test_a_wrong_dtype(load: Callable[[Path], Any], damaged: Path, name: str, dtype: torch.dtype) -> None:
    change_tensors(damaged, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    refuse(load, damaged, f"'{name}' of the checkpoint has dtype")


@pytest.mark.parametrize("version", [3, 1, 0, "2", True, None])
def test_an_unknown_format_version(load: Callable[[Path], Any], damaged: Path, version: object) -> None:
    change_config(damaged, lambda config: config.update(format_version=version))
    refuse(load, damaged, f"format version {version!r}; this rrsq reads version 2")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("recipe.activations.sparsity", 0.5),
        ("recipe.weights.bits", 3),
        ("recipe.novelty", True),
        ("rotation.extra", None),
        ("mystery", 1),
    ],
)
def test_a_field_that_this_version_does_not_know(
    load: Callable[[Path], Any], damaged: Path, path: str, value: object
) -> None:
    def change(config: dict[str, Any]) -> None:
        *parents, leaf = path.split(".")
        for parent in parents:
            config = config[parent]
        config[leaf] = value

    change_config(damaged, change)
    refuse(load, damaged, f"not valid at '{path}'")


def test_a_recipe_of_a_later_version_names_that_version(load: Callable[[Path], Any], damaged: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["recipe"]["weights"]["bits"] = 2
        config["versions"]["rrsq"] = "9.1.0"

    change_config(damaged, change)
    refuse(load, damaged, r"does not know the checkpoint's recipe 'rrs-w4a4kv4'.*wrote it \(9\.1\.0\)")


@pytest.mark.parametrize(
    "plan",
    [
        {"size": 64, "block": 48, "base": 12},
        {"size": 96, "block": 96, "base": 32},
        {"size": 92, "block": 23, "base": 23},
    ],
)
def test_an_impossible_rotation(load: Callable[[Path], Any], damaged: Path, plan: dict[str, int]) -> None:
    change_config(damaged, lambda config: config["rotation"].update(intermediate=plan))
    refuse(load, damaged, "impossible rotation")


def test_a_rotation_of_another_size(load: Callable[[Path], Any], damaged: Path) -> None:
    change_config(
        damaged, lambda config: config["rotation"].update(head={"size": 32, "block": 32, "base": 1})
    )
    refuse(load, damaged, "rotation 'head' of size 32; its recipe and config.json ask for 16")


@pytest.mark.parametrize("missing", ["recipe", "rotation"])
def test_a_required_part_that_is_missing(load: Callable[[Path], Any], damaged: Path, missing: str) -> None:
    change_config(damaged, lambda config: config.pop(missing))
    refuse(load, damaged, f"not valid at '{missing}'")


def test_no_weights_at_all(damaged: Path) -> None:
    (damaged / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors") as caught:
        rrsq.load(str(damaged))
    assert "\n" not in str(caught.value)


def test_a_config_that_is_no_json(damaged: Path) -> None:
    (damaged / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises((CheckpointError, ModelLoadError)) as caught:
        rrsq.load(str(damaged))
    assert "\n" not in str(caught.value)


def test_no_config(damaged: Path) -> None:
    (damaged / "config.json").unlink()
    with pytest.raises(ModelLoadError, match=r"holds no config\.json"):
        rrsq.load(str(damaged))


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no model folder"):
        rrsq.load(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{nonsense",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32"}}',
        b'{"a": {"data_offsets": [0]}}',
        b'{"a": {"data_offsets": ["x", "y"]}}',
        b'{"a": {"data_offsets": null}}',
        b"[" * 100000,
    ],
)
def test_headers_from_hell(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged"):
        read_header(file)


def test_a_header_longer_than_the_file(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(CheckpointError, match="header is cut off"):
        read_header(file)


def test_a_header_says_what_the_file_holds(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6, dtype=torch.uint8).view(2, 3), "b": torch.rand(4)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    places = read_header(tmp_path / "x.safetensors")
    assert {name: (place.dtype, place.shape, place.size) for name, place in places.items()} == {
        "a": ("U8", (2, 3), 6),
        "b": ("F32", (4,), 16),
    }
    assert all(torch.equal(place.read(), tensors[name]) for name, place in places.items())


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"format_version": 2},
        {"format_version": 2, "recipe": 5, "rotation": {}},
        {"format_version": 2, "recipe": {"overrides": [5], "activations": {"smoothing": 5}}, "rotation": {}},
        {"format_version": 2, "recipe": {"activations": {"smoothing": {"fold": "none"}}}, "rotation": {}},
    ],
)
def test_a_configuration_without_content(data: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        parse_info(data)
