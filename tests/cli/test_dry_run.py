"""``rrsq quantize --dry-run`` and ``rrsq inspect`` of a model say what a quantization then gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from cli_failures import failure
from rrsq.api import choose_recipe
from rrsq.cli.app import app
from rrsq.quantizer.forecast import forecast
from rrsq.quantizer.production.produce import OutputOptions, SourceModel, produce_checkpoint
from rrsq.runtime.format.describe import checkpoint_contents, stored_bits
from rrsq.runtime.format.loading import load_tokenizer


def rrsq(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.mark.parametrize("fixture", ["tiny_llama_dir", "tiny_qwen2_dir"])
def test_the_forecast_is_what_comes_out(fixture: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    model = str(request.getfixturevalue(fixture))
    recipe = choose_recipe("rtn-w4a4", ["head.bits=8"], ["*.o_proj", "*.layers.1.mlp.*"])
    found = forecast(model, recipe, num_samples=4, sequence_length=32)
    output = OutputOptions(tmp_path / "out")
    made = produce_checkpoint(SourceModel(model, load_tokenizer(model)), recipe, output, None)
    assert found.contents == checkpoint_contents(tmp_path / "out")
    assert (found.bytes_before, found.bytes_after) == (made.report.bytes_before, made.report.bytes_after)
    assert found.info.rotation == made.info.rotation
    layers = len(made.report.layers)
    assert found.kept == {
        "self_attn.o_proj": layers,
        "mlp.gate_proj": 1,
        "mlp.up_proj": 1,
        "mlp.down_proj": 1,
    }


@pytest.mark.parametrize(
    ("name", "rotation", "operation"),
    [
        ("rrs-w4a4kv4", "blocks (every input, 16 channels each)", "quantize_signed"),
        ("rrs1-w4a4kv4", "intermediate (96", "quantize_tokens"),
    ],
)
def test_a_dry_run_writes_nothing(
    name: str, rotation: str, operation: str, tiny_qwen2_dir: Path, tmp_path: Path
) -> None:
    words = ("--dry-run", "--ignore", "*.v_proj", "--recipe", name)
    done = rrsq("quantize", tiny_qwen2_dir, "-o", tmp_path / "out", *words)
    assert done.exit_code == 0, done.output
    assert list(tmp_path.iterdir()) == []
    recipe = choose_recipe(name, (), ["*.v_proj"])
    found = forecast(str(tiny_qwen2_dir), recipe, num_samples=128, sequence_length=2048)
    for expected in (
        stored_bits(found.contents),
        "self_attn.v_proj (2 layers)",
        "128 windows of 2048 tokens",
        rotation,
        "GB of memory",
        operation,
        "compute capability",
    ):
        assert expected in done.stdout


def test_a_dry_run_refuses_what_a_run_would(
    qwen2_checkpoint: Path, tiny_qwen2_dir: Path, tmp_path: Path
) -> None:
    dry = ["-o", tmp_path / "out", "--dry-run"]
    assert "quantized already" in failure(rrsq("quantize", qwen2_checkpoint, *dry), 2)
    assert "matches nothing" in failure(rrsq("quantize", tiny_qwen2_dir, *dry, "--ignore", "x"), 2)
    assert "--overwrite" in failure(rrsq("quantize", tiny_qwen2_dir, "-o", qwen2_checkpoint, "--dry-run"), 2)


def test_inspect_of_a_model(tiny_llama_dir: Path, tmp_path: Path) -> None:
    done = rrsq("inspect", tiny_llama_dir)
    assert done.exit_code == 0, done.output
    for expected in ("llama, 3 layers", "rrs-w4a4kv4", "size of weights", "INT4 linears", "float32"):
        assert expected in done.stdout
    assert "--layers is of a checkpoint" in failure(rrsq("inspect", tiny_llama_dir, "--layers"), 2)
    assert "no config.json" in failure(rrsq("inspect", tmp_path), 2)
