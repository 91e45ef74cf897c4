"""The task registry, the perplexity tasks, and the report."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rrsq.calibration.windows import data_fingerprint, evaluation_windows
from rrsq.errors import DataError, StorageError, UsageError
from rrsq.evaluation import tasks as tasks_module
from rrsq.evaluation.perplexity import perplexity
from rrsq.evaluation.report import EvaluationReport, ModelReport, write_json
from rrsq.evaluation.tasks import TaskOptions, TaskResult, parse_tasks, register_task, task_kinds


def result_of(value: float, *, fingerprint: str = "same") -> TaskResult:
    return TaskResult("wikitext2", "perplexity", value, False, "A convention.", 1.5, fingerprint, {"n": 3})


def report_of(value: float, baseline: float, **baseline_fields: str) -> EvaluationReport:
    reports = [
        ModelReport(name, "cpu", "float32", None, (result,))
        for name, result in (("out", result_of(value)), ("in", result_of(baseline, **baseline_fields)))
    ]
    return EvaluationReport(*reports, versions={"rrsq": "1"})


def test_names_are_read_in_order_and_once() -> None:
    parsed = parse_tasks("text:a.txt, wikitext2,wikitext2,text:someone/prose:hard")
    assert [task.name for task in parsed] == ["text:a.txt", "wikitext2", "text:someone/prose:hard"]


@pytest.mark.parametrize(
    ("specification", "message"),
    [
        ("wikitxt2", r"no task 'wikitxt2'\. Did you mean 'wikitext2'\? Known tasks: wikitext2, text:FILE"),
        ("wikitext2,tex:a.txt", "Did you mean 'text'"),
        ("text", "write text:FILE"),
        ("text:", "write text:FILE"),
        ("wikitext2:test", "write wikitext2"),
        (" , ", "No task was named"),
    ],
)
def test_wrong_names_are_usage_errors(specification: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_tasks(specification)


def test_a_new_kind_needs_only_its_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks_module, "_REGISTRY", dict(task_kinds()))

    class Constant:
        def __init__(self, name: str) -> None:
            self.name = name

        def prepare(self, options: TaskOptions) -> None: ...

        def run(self, model: object, tokenizer: object, options: TaskOptions) -> TaskResult:
            return result_of(0.25)

    register_task("accuracy", argument="NAME")(lambda argument: Constant(f"accuracy:{argument}"))
    (task,) = parse_tasks("accuracy:boolq")
    assert task.name == "accuracy:boolq"
    with pytest.raises(UsageError, match="accuracy:NAME"):
        parse_tasks("acc")


def test_missing_file_is_found_before_a_model_is_needed(tmp_path: Path) -> None:
    (task,) = parse_tasks(f"text:{tmp_path / 'none.txt'}")
    with pytest.raises(DataError, match="no text file"):
        task.prepare(TaskOptions())


def test_text_task_is_the_perplexity_of_its_windows(tiny_llama_dir: Path, tiny_text_file: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    said: list[tuple[int, int, str]] = []
    options = TaskOptions(sequence_length=64, limit=3, on_progress=lambda *call: said.append(call))
    (task,) = parse_tasks(f"text:{tiny_text_file}")
    task.prepare(options)
    result = task.run(model, tokenizer, options)

    windows = evaluation_windows(tokenizer, [tiny_text_file.read_text(encoding="utf-8")], 64, 3)
    expected = perplexity(model, windows)
    assert result.value == result.details["perplexity"] == expected.perplexity
    assert result.details["num_tokens"] == 3 * 63
    assert result.data_fingerprint == data_fingerprint(windows)
    assert "first 3 consecutive windows of 64 tokens" in result.convention
    assert said[-1] == (3, 3, f"perplexity {expected.perplexity:.2f}")


def test_window_beyond_the_context_is_a_usage_error(tiny_llama_dir: Path, tiny_text_file: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    (task,) = parse_tasks(f"text:{tiny_text_file}")
    options = TaskOptions(sequence_length=4096)
    task.prepare(options)
    with pytest.raises(UsageError, match="--sequence-length 2048 or less"):
        task.run(model, AutoTokenizer.from_pretrained(tiny_llama_dir), options)


def test_ratio_and_comparability() -> None:
    report = report_of(12.0, 10.0)
    assert report.ratio("wikitext2") == pytest.approx(1.2)
    assert report.compares_same_data("wikitext2")
    assert not report_of(12.0, 10.0, fingerprint="other").compares_same_data("wikitext2")
    assert EvaluationReport(report.model).ratio("wikitext2") is None


def test_report_is_json_even_of_broken_numbers(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    write_json(file, report_of(math.nan, math.inf).to_dict())
    document = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert document["model"]["results"][0]["value"] == "NaN"
    assert document["baseline"]["results"][0]["value"] == "Infinity"
    assert document["model"]["results"][0]["n"] == 3
    assert list(tmp_path.iterdir()) == [file]


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    file.write_text("old")
    with pytest.raises(ValueError, match="JSON"):
        write_json(file, {"value": math.nan})
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(StorageError, match="cannot be written"):
        write_json(tmp_path / "no" / "folder.json", {})
