"""``rrsq compare``: the numbers of quantize and eval, nothing done twice, nothing stale used."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import Result
from safetensors import safe_open
from typer.testing import CliRunner

from rrsq.cli.app import app
from rrsq.comparison import steps as comparison_run
from rrsq.comparison.model_files import model_fingerprint
from rrsq.comparison.plan import read_recipes
from rrsq.errors import RecipeError, UsageError
from tiny_quantized import load_tiny

RECIPES = "rtn-w4a4,rrs-w4a4kv4"
CALIBRATION = ("--num-samples", "2", "--calibration-length", "32")
SMALL = ("--device", "cpu", "--dtype", "float32", "--sequence-length", "64", "--limit", "3")


def rrsq(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def rrsq_compare(
    model: Path, folder: Path, hub: Path, *more: object, tasks: str = "wikitext2,kl,arc_e"
) -> Result:
    options = ("--recipes", RECIPES, "--tasks", tasks, "-o", folder, "--data-root", hub)
    return rrsq("compare", model, *options, *CALIBRATION, "--no-noise-floor", *SMALL, *more)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path, tiny_task_hub: Path) -> Path:
    """A finished comparison of a copy of the tiny model; ``model`` lies beside ``folder``."""
    root = tmp_path_factory.mktemp("comparison")
    shutil.copytree(tiny_llama_dir, root / "model")
    result = rrsq_compare(root / "model", root / "folder", tiny_task_hub)
    assert result.exit_code == 0, result.output
    return root


@pytest.fixture
def copy(done: Path, tmp_path: Path) -> Path:
    """A copy of the finished comparison that may be changed; its model stays where it was."""
    shutil.copytree(done / "folder", tmp_path / "folder")
    return tmp_path / "folder"


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a comparison does from here on: ``quantize RECIPE`` and ``measure MODEL TASKS``."""
    found: list[str] = []

    def spy(name: str, describe: Callable[..., str]) -> None:
        original = getattr(comparison_run, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            found.append(describe(*args))
            return original(*args, **kwargs)

        monkeypatch.setattr(comparison_run, name, wrapper)

    spy("produce_checkpoint", lambda model, recipe, *rest: f"quantize {recipe.name}")
    spy(
        "run_tasks", lambda name, model, tokenizer, tasks, *rest: f"measure {name} {','.join(tasks[0].names)}"
    )
    return found


def values(document: dict[str, Any]) -> dict[tuple[str, str], float]:
    """Value by task and metric, of each model in turn."""
    return {
        (result["task"], metric["name"]): metric["value"]
        for result in document["results"]
        for metric in result["metrics"]
    }


def test_numbers_are_those_of_quantize_and_eval(done: Path, tiny_task_hub: Path, tmp_path: Path) -> None:
    report = json.loads((done / "folder" / "report.json").read_text())
    assert [model["path"] for model in report["models"]] == ["full-precision", *RECIPES.split(",")]
    quantize = (
        "--num-samples",
        "2",
        "--sequence-length",
        "32",
        "--data-root",
        tiny_task_hub,
        "--device",
        "cpu",
    )
    for recipe in RECIPES.split(","):
        where = ("-o", tmp_path / recipe, "--data-root", tiny_task_hub)
        result = rrsq("quantize", done / "model", *where, "--recipe", recipe, *quantize)
        assert result.exit_code == 0, result.output
    models = [done / "model", *(tmp_path / recipe for recipe in RECIPES.split(","))]
    evaluate = ("--tasks", "wikitext2,kl,arc_e", "--data-root", tiny_task_hub, "--json", tmp_path / "r.json")
    result = rrsq("eval", *models, *evaluate, *SMALL)
    assert result.exit_code == 0, result.output
    expected = json.loads((tmp_path / "r.json").read_text())
    for ours, theirs in zip(report["models"], expected["models"], strict=True):
        assert values(ours) == values(theirs)
    assert values(report["models"][2])["kl", "kl_mean"] > 0


def test_report_says_what_was_done(done: Path) -> None:
    text = (done / "folder" / "report.md").read_text()
    report = json.loads((done / "folder" / "report.json").read_text())
    perplexity = values(report["models"][2])["wikitext2", "perplexity"]
    full = values(report["models"][0])["wikitext2", "perplexity"]
    row = next(line for line in text.splitlines() if line.startswith("| `rrs-w4a4kv4` | 4"))
    assert f"4.26, 4, 4.50 | {perplexity:.4f} (×{perplexity / full:.3f})" in row
    assert "Calibrated on 2 windows of 32 tokens of wikitext2" in text
    assert "rrsq" in report["command"]
    assert report["calibration"]["num_samples"] == 2
    assert report["recipes"]["rtn-w4a4"]["recipe"]["weights"]["method"] == "rtn"
    assert report["recipes"]["rrs-w4a4kv4"]["quantization"]["bytes_after"] > 0


def test_the_page_needs_nothing_else(done: Path) -> None:
    page = (done / "folder" / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|<script|<link|<img|@import|url\(", page)
    assert "prefers-color-scheme: dark" in page
    report = json.loads((done / "folder" / "report.json").read_text())
    # Three tasks over bits a weight and over speed.
    assert page.count("<svg") == page.count("</svg>") == 6
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        names = [
            text.text or ""
            for text in ElementTree.fromstring(svg).iter("text")
            if "name" in text.attrib["class"]
        ]
        assert all(any(recipe in name for name in names) for recipe in RECIPES.split(","))
    for model in report["models"]:
        for result in model["results"]:
            assert f"{result['metrics'][0]['value']:.4f}" in page


def test_size_and_speed_are_what_was_measured(done: Path) -> None:
    report = json.loads((done / "folder" / "report.json").read_text())
    full, _, ours = report["subjects"]
    shards = done / "folder" / "rrs-w4a4kv4" / "checkpoint" / "model.safetensors"
    with safe_open(shards, "pt") as file:
        stored = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert ours["stored_bytes"] == stored
    model = load_tiny(done / "model")
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert full["stored_bytes"] == 4 * weights
    assert full["stored_bits_per_weight"] == 32
    assert ours["stored_bits_per_weight"] == pytest.approx(8 * stored / weights)
    result = report["models"][2]["results"][0]
    assert ours["tokens_per_second"] == result["details"]["tokens_per_second"]
    # Three windows: no batch is three times as slow or fast as their mean on the whole.
    mean = result["details"]["num_tokens"] / result["details"]["seconds"]
    assert mean / 4 < ours["tokens_per_second"] < mean * 40


def test_nothing_is_done_twice(done: Path, copy: Path, tiny_task_hub: Path, steps: list[str]) -> None:
    before = (copy / "report.json").read_text()
    result = rrsq_compare(done / "model", copy, tiny_task_hub)
    assert result.exit_code == 0, result.output
    assert steps == []
    after, before = (json.loads(text) for text in ((copy / "report.json").read_text(), before))
    assert {key: after[key] for key in after if key != "command"} == {
        key: before[key] for key in before if key != "command"
    }
    shutil.rmtree(copy / "rtn-w4a4" / "checkpoint")
    assert rrsq_compare(done / "model", copy, tiny_task_hub).exit_code == 0
    assert steps == []


def test_a_further_task_runs_only_itself(
    done: Path, copy: Path, tiny_task_hub: Path, steps: list[str]
) -> None:
    result = rrsq_compare(done / "model", copy, tiny_task_hub, tasks="wikitext2,arc_e,boolq")
    assert result.exit_code == 0, result.output
    assert steps == [f"measure {name} boolq" for name in ("full-precision", *RECIPES.split(","))]
    report = json.loads((copy / "report.json").read_text())
    assert [result["task"] for result in report["models"][0]["results"]] == [
        "wikitext2", "arc_e", "boolq", "average",
    ]  # fmt: skip


@pytest.mark.parametrize("stop_at", ["quantize rrs-w4a4kv4", "measure rtn-w4a4 arc_e"])
def test_an_interrupted_run_goes_on(
    tiny_llama_dir: Path,
    tiny_task_hub: Path,
    tmp_path: Path,
    steps: list[str],
    monkeypatch: pytest.MonkeyPatch,
    stop_at: str,
) -> None:
    produce, run = comparison_run.produce_checkpoint, comparison_run.run_tasks

    def interrupted(original: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if steps[-1] == stop_at:
                raise KeyboardInterrupt
            return result

        return wrapper

    monkeypatch.setattr(comparison_run, "produce_checkpoint", interrupted(produce))
    monkeypatch.setattr(comparison_run, "run_tasks", interrupted(run))
    stopped = rrsq_compare(tiny_llama_dir, tmp_path / "folder", tiny_task_hub, tasks="wikitext2,arc_e")
    assert stopped.exit_code == 1
    assert "Interrupted" in stopped.stderr
    assert not (tmp_path / "folder" / "report.md").exists()
    finished = [step for step in steps if step != stop_at]
    assert finished
    steps.clear()
    monkeypatch.setattr(comparison_run, "produce_checkpoint", produce)
    monkeypatch.setattr(comparison_run, "run_tasks", run)
    result = rrsq_compare(tiny_llama_dir, tmp_path / "folder", tiny_task_hub, tasks="wikitext2,arc_e")
    assert result.exit_code == 0, result.output
    assert steps[0] == stop_at
    assert not set(steps) & set(finished)
    assert (tmp_path / "folder" / "report.md").is_file()


def test_only_what_an_input_decides_is_done_again(
    done: Path, copy: Path, tiny_task_hub: Path, steps: list[str]
) -> None:
    more_text = rrsq_compare(done / "model", copy, tiny_task_hub, "--num-samples", "3")
    assert more_text.exit_code == 0, more_text.output
    assert "rrs-w4a4kv4: quantized again; changed: calibration" in more_text.stderr
    names = ("wikitext2", "kl", "arc_e")
    # Rounding to nearest needs no calibration text.
    assert steps == ["quantize rrs-w4a4kv4", *(f"measure rrs-w4a4kv4 {name}" for name in names)]
    steps.clear()
    fewer = rrsq_compare(done / "model", copy, tiny_task_hub, "--num-samples", "3", "--limit", "2")
    assert "measured again; changed: limit" in fewer.stderr
    assert not [step for step in steps if step.startswith("quantize")]
    assert len(steps) == 2 + 3 + 3


def test_a_changed_model_is_noticed(
    done: Path, copy: Path, tiny_task_hub: Path, steps: list[str], tiny_qwen2_dir: Path
) -> None:
    config = done / "model" / "config.json"
    original = config.read_text()
    try:
        config.write_text(original.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
        assert config.read_text() != original
        result = rrsq_compare(done / "model", copy, tiny_task_hub, tasks="wikitext2")
    finally:
        config.write_text(original)
    assert result.exit_code == 0, result.output
    assert "full-precision: wikitext2 is measured again; changed: model" in result.stderr
    assert [step for step in steps if step.startswith("quantize")] == [
        f"quantize {recipe}" for recipe in RECIPES.split(",")
    ]
    other = rrsq_compare(tiny_qwen2_dir, copy, tiny_task_hub)
    assert other.exit_code == 2
    assert "holds a comparison of the model" in other.stderr


def test_a_foreign_folder_and_a_quantized_model_are_refused(
    done: Path, tiny_task_hub: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    result = rrsq_compare(done / "model", tmp_path, tiny_task_hub)
    assert result.exit_code == 2
    assert "is no folder of 'rrsq compare'" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    quantized = done / "folder" / "rtn-w4a4" / "checkpoint"
    result = rrsq_compare(quantized, tmp_path / "new", tiny_task_hub)
    assert result.exit_code == 2
    assert "quantized already" in result.stderr


def test_recipes_go_by_different_names(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: rtn-w4a4\n")
    with pytest.raises(UsageError, match="goes by the name 'rtn-w4a4', which is taken"):
        read_recipes(["rtn-w4a4", str(path)])
    path.write_text("name: full-precision\n")
    with pytest.raises(UsageError, match="taken"):
        read_recipes([str(path)])
    path.write_text("name: ../my recipe\n")
    assert list(read_recipes([str(path)])) == ["my-recipe"]
    with pytest.raises(RecipeError, match="Did you mean 'rtn-w4a4'"):
        read_recipes(["rtn-w4a5"])
    with pytest.raises(UsageError, match="No recipe was named"):
        read_recipes([])


def test_fingerprint_is_of_all_bytes_that_matter(tiny_llama_dir: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama_dir, model)
    before = model_fingerprint(str(model))
    assert before == model_fingerprint(str(tiny_llama_dir))
    (model / "README.md").write_text("a card")
    assert model_fingerprint(str(model)) == before
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    assert model_fingerprint(str(model)) != before
