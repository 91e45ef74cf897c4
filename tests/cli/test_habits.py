"""Schemes, patterns to ignore, tasks at the end of a quantization, what a shell completes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from cli_failures import failure
from rrsq.cli.app import app
from rrsq.cli.completion import complete_model, complete_recipe, complete_scheme, complete_tasks
from rrsq.errors import RecipeError
from rrsq.recipe import recipe_names
from rrsq.runtime.format.describe import checkpoint_contents, stored_bits
from rrsq.runtime.format.loading import read_info
from rrsq.schemes import SCHEMES, scheme_recipe

SMALL = ["--num-samples", "2", "--sequence-length", "32", "--device", "cpu"]


def rrsq(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def test_schemes_are_names_of_recipes() -> None:
    assert set(SCHEMES.values()) <= set(recipe_names())
    assert scheme_recipe("w4a8kv4") == "rrs-w4a8kv4"
    with pytest.raises(RecipeError, match="Did you mean 'W4A16'"):
        scheme_recipe("W4A17")


def test_scheme_ignore_and_tasks(
    tiny_qwen2_dir: Path, tiny_text_file: Path, tiny_hub: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = rrsq(
        "quantize", tiny_qwen2_dir, "-o", out, "--scheme", "w4a16", "--ignore", "*.layers.0.*",
        "--ignore", "*.o_proj", "--calibration-data", tiny_text_file, "--tasks", f"text:{tiny_text_file},kl",
        "--limit", "2", "--data-root", tiny_hub, *SMALL,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    recipe = read_info(out).recipe
    assert recipe.name == "gptq-w4a16"
    assert recipe.modules_to_not_convert == ("*.layers.0.*", "*.o_proj")
    contents = checkpoint_contents(out)
    (line,) = (line for line in done.stdout.splitlines() if "bits per weight" in line)
    assert stored_bits(contents) in line
    for expected in ("perplexity", "KL", "recovery:"):
        assert expected in done.output


def test_bits_per_weight_count_scales_and_what_is_kept(qwen2_checkpoint: Path) -> None:
    _, size, weights = checkpoint_contents(qwen2_checkpoint)["INT4 linears"]
    # 64 or 96 inputs: 4 bits, a byte for each group of 32, a float32 scale a row.
    qkv_o_gate_up, down = 4 + 8 / 32 + 32 / 64, 4 + 8 / 32 + 32 / 96
    layer = 64 * (64 + 32 + 32 + 64 + 96 + 96), 64 * 96
    expected = (layer[0] * qkv_o_gate_up + layer[1] * down) / sum(layer)
    assert weights == 2 * sum(layer)
    assert 8 * size / weights == pytest.approx(expected)
    tensors = sum(size for _, size, _ in checkpoint_contents(qwen2_checkpoint).values())
    said = stored_bits(checkpoint_contents(qwen2_checkpoint))
    assert said.startswith(f"{expected:.2f} of INT4 linears, ")
    file = (qwen2_checkpoint / "model.safetensors").stat().st_size
    assert tensors <= file


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--scheme", "W4A4KV"], "Did you mean 'W4A4KV4'?"),
        (["--scheme", "W4A16", "--recipe", "rtn-w4a4"], "Leave out --recipe or --scheme"),
        (["--ignore", "o_proj"], "Did you mean '*.o_proj'?"),
        (["--ignore", "*.q_proy"], "Did you mean '*.q_proj'?"),
        (["--tasks", "wikitex:x"], "Did you mean 'wikitext2'?"),
        (["--tasks", "text:missing.txt"], "missing.txt"),
        (["--limit", "2"], "--limit is of --tasks"),
    ],
)
def test_wrong_habits_write_nothing(
    tiny_qwen2_dir: Path, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    done = rrsq("quantize", tiny_qwen2_dir, "-o", tmp_path / "out", *arguments, *SMALL)
    assert expected in failure(done, 2)
    assert list(tmp_path.iterdir()) == []


def test_completion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RRSQ_DATA_ROOT", str(tmp_path / "root"))
    (tmp_path / "root" / "some" / "model").mkdir(parents=True)
    (tmp_path / "root" / "some" / "model" / "config.json").touch()
    (tmp_path / "cache" / "models--some--other-model").mkdir(parents=True)
    (tmp_path / "sofa.gguf").touch()
    (tmp_path / "song.txt").touch()
    assert complete_model("so") == ["some/model", "some/other-model", "sofa.gguf"]
    assert complete_model("root/") == ["root/some/"]
    assert complete_model("nowhere/x") == []
    assert complete_recipe("rrs-w") == ["rrs-w4a4kv4", "rrs-w4a8kv4"]
    assert complete_scheme("w4a1") == ["W4A16"]
    assert complete_tasks("wikitext2,ar") == ["wikitext2,arc_e", "wikitext2,arc_c"]
    assert complete_tasks("te") == ["text:"]
    assert complete_tasks("kl,k") == []


def test_a_shell_is_answered() -> None:
    environment = {**os.environ, "_RRSQ_COMPLETE": "complete_bash", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"COMP_WORDS": "rrsq quantize m --recipe rrs-w4a8", "COMP_CWORD": "4"}
    code = "from rrsq.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "rrs-w4a8kv4", done.stderr
