"""``rrsq export``: what it writes, what it refuses, and that it writes all or nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cli_failures import failure
from rrsq.cli.app import app
from rrsq.exporting import produce
from tiny_families import tiny_model
from tiny_quantized import quantize_tiny, recipe_of, save_tiny

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EXPORTABLE = "w4a16-rotated", ("weights.group_size=32", "weights.method=rtn")


def rrsq(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def checkpoint(tiny_qwen2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe, overrides = EXPORTABLE
    quantized = quantize_tiny(tiny_qwen2_dir, recipe_of(recipe, overrides))
    return save_tiny(quantized, tiny_qwen2_dir, tmp_path_factory.mktemp("checkpoint") / "out")


def test_an_export_is_a_whole_model_folder(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "plain"
    done = rrsq("export", checkpoint, "-o", out, "--dtype", "bfloat16", "--max-shard-size", "40KB")
    assert done.exit_code == 0, done.output
    assert "INT4 weights, a scale for 32 channels, 16-bit inputs" in done.stdout
    config = json.loads((out / "config.json").read_text())
    original = json.loads((checkpoint / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert original.pop("quantization_config")["quant_method"] == "rrsq"
    assert config == original | {"dtype": "bfloat16"}
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 1
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert {path.name for path in out.glob("*.safetensors")} == set(index["weight_map"].values())
    for path in checkpoint.glob("*.json"):
        if path.name not in ("config.json", "model.safetensors.index.json"):
            assert (out / path.name).read_bytes() == path.read_bytes()
    card = (out / "README.md").read_text()
    assert "vllm serve" in card
    assert "INT4 weights, a scale for 32 channels, 16-bit inputs | 14 linears" in card
    assert "dropped" not in card
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_it_replaces_only_if_asked(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "plain"
    assert rrsq("export", checkpoint, "-o", out).exit_code == 0
    before = (out / "model.safetensors").read_bytes()
    assert "exists already" in failure(rrsq("export", checkpoint, "-o", out, "--dtype", "float16"), 2)
    assert (out / "model.safetensors").read_bytes() == before
    assert rrsq("export", checkpoint, "-o", out, "--dtype", "float16", "--overwrite").exit_code == 0
    assert (out / "model.safetensors").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_run_that_broke_off(
    error: BaseException, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    whole = produce.OutputShards.write

    def breaks(shards: produce.OutputShards, tensors: dict) -> str:
        written.append(len(tensors))
        if len(written) > 3:
            raise error
        return whole(shards, tensors)

    monkeypatch.setattr(produce.OutputShards, "write", breaks)
    message = failure_or_interruption(rrsq("export", checkpoint, "-o", tmp_path / "plain"))
    assert "full" in message or "stopped by the user" in message
    assert list(tmp_path.iterdir()) == []


def failure_or_interruption(result: Result) -> str:
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def test_the_checkpoint_itself_is_never_written_to(checkpoint: Path, tmp_path: Path) -> None:
    copied = tmp_path / "out"
    shutil.copytree(checkpoint, copied)
    for out in (copied, copied / "plain", tmp_path):
        assert "not apart" in failure(rrsq("export", copied, "-o", out, "--overwrite"), 2)
    assert sorted(path.name for path in copied.iterdir()) == sorted(
        path.name for path in checkpoint.iterdir()
    )


WITHOUT = "rotation.across_heads=false", "rotation.intermediate=false"
# A recipe with overrides, and words of the message.
REFUSED: dict[str, tuple[str, tuple[str, ...], str]] = {
    "blocks": ("rrs-w4a8kv4", (), "at run time (blocks)"),
    "full rotations": ("rrs1-w4a8kv4", (), "at run time (across_heads, intermediate)"),
    "4-bit activations": ("rtn-w4a4", (), "has 4-bit activations"),
    "a clipped input": ("rtn-w4a4", ("activations={bits: 8, clip: 0.9}",), "is clipped"),
    "signed levels": ("rtn-w4a4", ("activations={bits: 8, signed: true}",), "signed levels"),
    "a smoothed input": (
        "rtn-w4a4",
        ("activations={bits: 8, smoothing: {scales: real, group_size: 16}}",),
        "smoothed in groups",
    ),
    "a quantized cache": (
        "rtn-w4a4",
        ("weights.group_size=32", "activations.bits=16", "kv_cache={}"),
        "Give --drop-cache",
    ),
    "small groups": (
        "gptq-w4a16",
        ("weights={method: rtn, group_size: 16}",),
        "--set weights.group_size=128",
    ),
    "one linear of three": (
        "gptq-w4a16",
        ("weights={method: rtn, group_size: 32}", "modules_to_not_convert=['*.v_proj']"),
        "engines make one matrix of them",
    ),
    "an 8-bit embedding": (
        "gptq-w4a16",
        ("weights={method: rtn, group_size: 32}", "embedding.bits=8"),
        "--set embedding.bits=16",
    ),
    "nothing": ("gptq-w4a16", ("weights.bits=16",), "nothing to export"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_others_would_get_wrong_is_refused(case: str, tiny_qwen2_dir: Path, tmp_path: Path) -> None:
    recipe, overrides, words = REFUSED[case]
    quantized = quantize_tiny(tiny_qwen2_dir, recipe_of(recipe, overrides))
    made = save_tiny(quantized, tiny_qwen2_dir, tmp_path / "out")
    message = failure(rrsq("export", made, "-o", tmp_path / "plain"), 2)
    assert words in message
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("case", ["blocks", "full rotations", "a quantized cache", "an 8-bit embedding"])
def test_what_config_json_tells_is_refused_before_any_shard_is_opened(
    case: str, tiny_qwen2_dir: Path, tmp_path: Path
) -> None:
    recipe, overrides, words = REFUSED[case]
    made = save_tiny(
        quantize_tiny(tiny_qwen2_dir, recipe_of(recipe, overrides)), tiny_qwen2_dir, tmp_path / "out"
    )
    (made / "model.safetensors").unlink()
    assert words in failure(rrsq("export", made, "-o", tmp_path / "plain"), 2)


@pytest.mark.parametrize("case", ["4-bit activations", "small groups", "one linear of three", "nothing"])
def test_what_a_linear_tells_is_refused_before_any_tensor_is_read(
    case: str, tiny_qwen2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, overrides, words = REFUSED[case]
    made = save_tiny(
        quantize_tiny(tiny_qwen2_dir, recipe_of(recipe, overrides)), tiny_qwen2_dir, tmp_path / "out"
    )
    read: list[Path] = []
    monkeypatch.setattr(produce.TensorPlace, "read", lambda place: read.append(place.file))
    assert words in failure(rrsq("export", made, "-o", tmp_path / "plain"), 2)
    assert not read


def test_a_scale_that_float16_cannot_hold_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    large = tmp_path / "large"
    shutil.copytree(checkpoint, large)
    tensors = load_file(large / "model.safetensors")
    last = "model.layers.1.mlp.down_proj.weight_scale"
    save_file(tensors | {last: tensors[last] * 1e8}, large / "model.safetensors", {"format": "pt"})
    refused = rrsq("export", large, "-o", tmp_path / "plain", "--dtype", "float16")
    assert "float16 cannot hold the scales of 'model.layers.1.mlp.down_proj'" in failure(refused, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["large"]


# A family, with overrides of the recipe, and words of the message.
ARCHITECTURES: dict[str, tuple[tuple[str, ...], str]] = {
    "opt": ((), "LayerNorms"),
    "gemma2": ((), "at run time (residual_online)"),
    "gemma": ((), "vLLM's gemma has none beside the embedding"),
    "gemma3": (("rotation=null",), "('model.vision_tower')"),
    "mixtral": (("rotation=null",), "Mixtures of experts are not exported"),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_without_a_place_for_it_are_refused(
    name: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    overrides, words = ARCHITECTURES[name]
    source = tmp_path / "model"
    tiny_model(name).save_pretrained(source)
    tiny_tokenizer.save_pretrained(source)
    recipe = recipe_of("w4a16-rotated", ["weights={method: rtn}", *overrides])
    made = save_tiny(quantize_tiny(source, recipe), source, tmp_path / "out")
    assert words in failure(rrsq("export", made, "-o", tmp_path / "plain"), 2)


def test_a_cache_is_dropped_if_asked(tiny_qwen2_dir: Path, tmp_path: Path) -> None:
    recipe = recipe_of("rtn-w4a4", ["weights.group_size=32", "activations.bits=16", "kv_cache={}"])
    made = save_tiny(quantize_tiny(tiny_qwen2_dir, recipe), tiny_qwen2_dir, tmp_path / "out")
    done = rrsq("export", made, "-o", tmp_path / "plain", "--drop-cache")
    assert done.exit_code == 0, done.output
    assert "the checkpoint's own is quantized" in done.stdout
    assert "has a quantized KV cache, and this model has not" in (tmp_path / "plain/README.md").read_text()


Break = Callable[[Path], object]


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_truncate, "damaged"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    ],
)
def test_damaged_checkpoints(damage: Break, words: str, checkpoint: Path, tmp_path: Path) -> None:
    made = tmp_path / "out"
    shutil.copytree(checkpoint, made)
    damage(made)
    result = rrsq("export", made, "-o", tmp_path / "plain")
    assert words in failure(result, result.exit_code)
    assert result.exit_code in (1, 2)
    assert not (tmp_path / "plain").exists()


def test_a_model_that_rrsq_did_not_quantize(tiny_qwen2_dir: Path, tmp_path: Path) -> None:
    assert "none that rrsq quantized" in failure(rrsq("export", tiny_qwen2_dir, "-o", tmp_path / "plain"), 1)


def test_wrong_options(checkpoint: Path, tmp_path: Path) -> None:
    plain = "export", checkpoint, "-o", tmp_path / "plain"
    assert "is no size" in failure(rrsq(*plain, "--max-shard-size", "many"), 2)
    failure(rrsq(*plain, "--format", "gguf"), 2)
    failure(rrsq(*plain, "--dtype", "int8"), 2)
    failure(rrsq("export", checkpoint), 2)
    assert list(tmp_path.iterdir()) == []
