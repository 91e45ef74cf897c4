"""``rrsq.quantize`` and ``rrsq.evaluate`` as a Python user calls them, rightly and wrongly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import rrsq
from rrsq.cli.app import app
from rrsq.errors import OutputExistsError, RecipeError, UsageError
from rrsq.evaluation.perplexity import perplexity
from rrsq.quantizer.calibration.windows import evaluation_windows
from rrsq.recipe import load_recipe
from rrsq.runtime.format.loading import read_info

SMALL: dict[str, Any] = {"num_samples": 2, "sequence_length": 32, "device": "cpu"}


def test_the_functions_are_found_and_not_imported_before() -> None:
    code = (
        "import sys, rrsq\n"
        "assert {'quantize', 'evaluate', 'load'} <= set(dir(rrsq))\n"
        "assert 'rrsq.api' not in sys.modules\n"
        "assert rrsq.quantize.__module__ == 'rrsq.api'\n"
        "print('torch' in sys.modules, hasattr(rrsq, 'quantise'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False False", done.stderr


def test_a_checkpoint_is_the_command_lines(
    tiny_qwen2_dir: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    steps: list[tuple[int, int]] = []
    notes: list[str] = []
    report = rrsq.quantize(
        tiny_qwen2_dir,
        tmp_path / "python",
        recipe="rrs-w4a8kv4",
        overrides=["weights.group_size=16"],
        calibration_data=tiny_text_file,
        on_step=lambda done, total, per_layer, text: steps.append((done, total)),
        on_note=notes.append,
        **SMALL,
    )
    assert len(report.layers) == 2
    assert report.bytes_after < report.bytes_before
    assert max(steps) == (max(total for _, total in steps),) * 2
    assert any("GB" in note or "MB" in note for note in notes)
    command = [
        "quantize", tiny_qwen2_dir, "-o", tmp_path / "shell", "--recipe", "rrs-w4a8kv4",
        "--set", "weights.group_size=16", "--calibration-data", tiny_text_file,
        "--num-samples", "2", "--sequence-length", "32", "--device", "cpu",
    ]  # fmt: skip
    done = CliRunner().invoke(app, [str(word) for word in command])
    assert done.exit_code == 0, done.output
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("python", "shell"))
    assert ours.keys() == theirs.keys()
    assert all(bool((ours[name] == theirs[name]).all()) for name in ours)
    assert read_info(tmp_path / "python") == read_info(tmp_path / "shell")


def test_a_recipe_may_be_an_object(tiny_qwen2_dir: Path, tmp_path: Path) -> None:
    recipe = load_recipe("rtn-w4a4", ["weights.group_size=8"])
    rrsq.quantize(
        str(tiny_qwen2_dir), str(tmp_path / "out"), recipe=recipe, overrides=["head.bits=8"], **SMALL
    )
    stored = read_info(tmp_path / "out").recipe
    assert (stored.weights.group_size, stored.head.bits) == (8, 8)
    assert stored.name == "rtn-w4a4"


def test_evaluation_gives_the_perplexity(
    qwen2_checkpoint: Path, tiny_qwen2_dir: Path, tiny_hub: Path
) -> None:
    seen: list[str] = []
    report = rrsq.evaluate(
        [tiny_qwen2_dir, str(qwen2_checkpoint)],
        ["wikitext2", "kl"],
        limit=2,
        sequence_length=64,
        device="cpu",
        dtype="float32",
        data_root=tiny_hub,
        on_step=lambda model, doing, done, total, so_far: seen.append(doing),
    )
    from rrsq.quantizer.calibration.text import load_documents

    documents = load_documents("wikitext2", split="test", data_root=tiny_hub)
    windows = evaluation_windows(AutoTokenizer.from_pretrained(tiny_qwen2_dir), documents, 64, 2)
    expected = perplexity(AutoModelForCausalLM.from_pretrained(tiny_qwen2_dir), windows).perplexity
    result = report.models[0].result("wikitext2")
    assert result is not None
    assert result.headline.value == pytest.approx(expected, rel=1e-6)
    assert report.reference is report.models[0]
    assert report.models[1].result("kl") is not None
    assert {"loading", "wikitext2", "kl"} <= set(seen)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"recipe": "rrs-w4a4kv"}, "Did you mean 'rrs-w4a4kv4'?"),
        ({"overrides": ["weights.groupsize=3"]}, "Did you mean 'group_size'?"),
        ({"recipe": load_recipe("rtn-w4a4"), "overrides": ["weights.bits=3"]}, "weights.bits"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"device": "tpu"}, "There is no device 'tpu'"),
        ({"calibration_data": "missing.txt"}, "missing.txt"),
    ],
)
def test_wrong_arguments_write_nothing(
    tiny_qwen2_dir: Path, tmp_path: Path, arguments: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UsageError, match=expected.replace("?", r"\?")):
        rrsq.quantize(tiny_qwen2_dir, tmp_path / "out", **{**SMALL, **arguments})
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_kept(tiny_qwen2_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(OutputExistsError):
        rrsq.quantize(tiny_qwen2_dir, tmp_path / "out", recipe="rtn-w4a4", **SMALL)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


def test_wrong_evaluations(tiny_qwen2_dir: Path) -> None:
    with pytest.raises(UsageError, match="limit is 0"):
        rrsq.evaluate(tiny_qwen2_dir, limit=0)
    with pytest.raises(UsageError, match="No model"):
        rrsq.evaluate([])
    with pytest.raises(UsageError, match="no task 'wikitex2:x'"):
        rrsq.evaluate(tiny_qwen2_dir, "wikitex2:x", device="cpu")
    with pytest.raises(RecipeError):
        rrsq.quantize(tiny_qwen2_dir, "nowhere", recipe="")
