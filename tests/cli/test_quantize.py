"""``rrsq quantize``, ``inspect``, ``generate`` and ``recipes`` as a user runs them, rightly and wrongly."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import yaml
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cli_failures import failure
from rrsq.cli.app import app
from rrsq.recipe import recipe_names
from tiny_families import tiny_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SMALL = ["--num-samples", "2", "--sequence-length", "32"]


def rrsq(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2_dir: Path, tiny_text_file: Path) -> Path:
    out = tmp_path_factory.mktemp("cli") / "out"
    result = rrsq("quantize", tiny_qwen2_dir, "-o", out, "--calibration-data", tiny_text_file, *SMALL)
    assert result.exit_code == 0, result.output
    assert "size of weights" in result.output
    assert "peak memory" in result.output
    assert "fell back to RTN" in result.output
    return out


def test_quantized_folder_is_evaluated_beside_its_source(
    checkpoint: Path, tiny_qwen2_dir: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    result = rrsq(
        "eval", checkpoint, "--baseline", tiny_qwen2_dir, "--tasks", f"text:{tiny_text_file}",
        "--json", report, "--sequence-length", "64", "--limit", "2",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    written = json.loads(report.read_text())
    original, quantized = (model["results"][0]["metrics"][0]["value"] for model in written["models"])
    assert quantized != original
    assert quantized == pytest.approx(original, rel=0.5)


@pytest.mark.parametrize("family", ["olmo2", "llama"])
def test_the_summary_says_where_r1_is_not_folded(
    family: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    tiny_model(family).save_pretrained(model)
    tiny_tokenizer.save_pretrained(model)
    rotated = ["--recipe", "rtn-w4a4", "--set", "rotation={}"]
    output = rrsq("quantize", model, "-o", tmp_path / "out", *rotated).output
    hidden = {"olmo2": 56, "llama": 60}[family]
    online = f"residual ({hidden}), online at the inputs of attention and MLP, since norms behind them"
    assert (online in output) == (family == "olmo2")
    assert (f"residual ({hidden});" in output) == (family == "llama")


def test_bos_is_stored_with_the_checkpoint(
    tiny_qwen2_dir: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["--calibration-data", tiny_text_file, *SMALL, "--bos", "always"]
    assert rrsq("quantize", tiny_qwen2_dir, "-o", out, *arguments).exit_code == 0
    assert json.loads((out / "config.json").read_text())["quantization_config"]["calibration"][
        "bos_each_window"
    ]
    assert "each behind BOS" in rrsq("inspect", out).stdout


def test_inspect_shows_what_was_done(checkpoint: Path) -> None:
    output = rrsq("inspect", checkpoint, "--layers").output
    for expected in ("rrs-w4a4kv4", "INT4 keys", "2 windows of 32 tokens", "output SNR"):
        assert expected in output


def test_generate_continues_the_prompt(checkpoint: Path) -> None:
    result = rrsq("generate", checkpoint, "the cat", "--max-new-tokens", "4")
    assert result.exit_code == 0, result.output
    assert "the cat" in result.output


def test_recipes_lists_all_and_prints_one() -> None:
    listing = rrsq("recipes").output
    rows = {line.split()[0]: line.split()[1:4] for line in listing.splitlines() if " " in line}
    assert set(recipe_names()) <= set(rows)
    assert rows["rrs-w4a4kv4"] == ["4.258", "4", "4.5"]
    assert rows["gptq-w4a16"] == ["4.07", "16", "16"]
    printed = yaml.safe_load(rrsq("recipes", "rrs-w4a4kv4").output)
    assert printed["activations"]["smoothing"]["scope"] == "token"


def test_existing_output_is_kept(checkpoint: Path, tiny_qwen2_dir: Path, tiny_text_file: Path) -> None:
    before = (checkpoint / "config.json").read_bytes()
    arguments = ["quantize", tiny_qwen2_dir, "-o", checkpoint, "--calibration-data", tiny_text_file, *SMALL]
    assert "--overwrite" in failure(rrsq(*arguments), 2)
    assert (checkpoint / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--recipe", "rrs-w4a4kv"], "Did you mean 'rrs-w4a4kv4'?"),
        (["--set", "weights.groupsize=3"], "Did you mean 'group_size'?"),
        (["--set", "weights.group_size"], "KEY=VALUE"),
        (["--calibration-data", "missing.txt"], "missing.txt"),
        (["--num-samples", "0"], "num-samples"),
        (
            ["--max-shard-size", "5 shards", "--calibration-data", "missing.txt"],
            "--max-shard-size '5 shards'",
        ),
    ],
)
def test_wrong_options(tiny_qwen2_dir: Path, tmp_path: Path, arguments: list[str], expected: str) -> None:
    result = rrsq("quantize", tiny_qwen2_dir, "-o", tmp_path / "out", *arguments)
    assert expected in failure(result, 2)
    assert list(tmp_path.iterdir()) == []


def test_missing_model_folder(tmp_path: Path) -> None:
    assert "no model folder" in failure(rrsq("quantize", tmp_path / "nothing", "-o", tmp_path / "out"), 2)


def test_a_hub_id_is_found_under_the_data_root(
    tiny_qwen2_dir: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_qwen2_dir, tmp_path / "hub" / "some-org" / "some-model")
    data = ["--calibration-data", tiny_text_file, "--data-root", tmp_path / "hub"]
    result = rrsq("quantize", "some-org/some-model", "-o", tmp_path / "out", *data, *SMALL)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "config.json").is_file()


def test_hub_out_of_reach_says_how_to_go_on(tmp_path: Path) -> None:
    message = failure(rrsq("quantize", "some-org/some-model", "-o", tmp_path / "out"), 2)
    assert "--data-root" in message
    assert "RRSQ_DATA_ROOT" in message


def test_unsupported_architecture_lists_the_supported(tmp_path: Path) -> None:
    model = tmp_path / "gpt2"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    message = failure(rrsq("quantize", model, "-o", tmp_path / "out"), 2)
    assert "llama, mistral" in message
    assert "docs/adding-a-model.md" in message


def test_missing_tokenizer(tiny_qwen2_dir: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_qwen2_dir, model, ignore=shutil.ignore_patterns("tokenizer*"))
    assert "tokenizer.json" in failure(rrsq("quantize", model, "-o", tmp_path / "out"), 2)
    assert not (tmp_path / "out").exists()


def test_nan_in_a_weight_is_named(tiny_qwen2_dir: Path, tiny_text_file: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_qwen2_dir, model)
    weights = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][0, 0] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    result = rrsq("quantize", model, "-o", tmp_path / "out", "--calibration-data", tiny_text_file, *SMALL)
    assert name in failure(result, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_disk_without_room_is_found_early(
    tiny_qwen2_dir: Path, tiny_text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    result = rrsq(
        "quantize", tiny_qwen2_dir, "-o", tmp_path / "out", "--calibration-data", tiny_text_file, *SMALL
    )
    assert "MB free" in failure(result, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_model_is_not_quantized_again(checkpoint: Path, tmp_path: Path) -> None:
    assert "quantized already" in failure(rrsq("quantize", checkpoint, "-o", tmp_path / "out"), 2)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_leaves_nothing(
    tiny_qwen2_dir: Path, tiny_text_file: Path, tmp_path: Path, number: signal.Signals
) -> None:
    # A hundred thousand windows keep the run busy until the signal comes.
    text = tmp_path / "text.txt"
    text.write_text(tiny_text_file.read_text() * 60)
    command = [
        sys.executable, "-m", "rrsq.cli", "quantize", str(tiny_qwen2_dir), "-o", str(tmp_path / "out"),
        "--calibration-data", str(text), "--num-samples", "100000", "--sequence-length", "8",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    # A shell may have started the tests with SIGINT ignored, which a child would inherit.
    with subprocess.Popen(
        command,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        # It is past its imports when it has its work folder, and seconds away from its first layer.
        while process.poll() is None and not (tmp_path / ".out.work" / "manifest.json").exists():
            time.sleep(0.01)
        process.send_signal(number)
        message = process.stderr.read() if process.stderr is not None else ""
    assert process.returncode == 1, message
    assert "Interrupted" in message
    assert "Traceback" not in message
    assert list(tmp_path.iterdir()) == [text]
