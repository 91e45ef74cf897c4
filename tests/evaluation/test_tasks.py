"""The task registry, the perplexity tasks, and the report."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rrsq.errors import DataError, StorageError, UsageError
from rrsq.evaluation import tasks as tasks_module
from rrsq.evaluation.perplexity import perplexity
from rrsq.evaluation.results import Metric, TaskResult
from rrsq.evaluation.scores import EvaluationReport, ModelReport, write_json
from rrsq.evaluation.tasks import TaskOptions, parse_tasks, register_task, task_kinds
from rrsq.quantizer.calibration.windows import BosChoice, data_fingerprint, evaluation_windows
from tiny_families import tiny_model


def result_of(value: float, *, task: str = "wikitext2", metric: str = "perplexity") -> TaskResult:
    metrics = (Metric(metric, value, higher_is_better=metric != "perplexity", stderr=0.5),)
    return TaskResult(task, metrics, "A convention.", 1.5, "same", {"n": 3})


def report_of(reference: float, value: float, **options: str) -> EvaluationReport:
    reports = [
        ModelReport(name, "cpu", "float32", None, (result_of(number, **options),))
        for name, number in (("in", reference), ("out", value))
    ]
    return EvaluationReport(tuple(reports), versions={"rrsq": "1"})


def test_names_are_read_in_order_and_once() -> None:
    parsed = parse_tasks("text:a.txt, wikitext2,wikitext2,text:someone/prose:hard")
    assert [task.names for task in parsed] == [("text:a.txt",), ("wikitext2",), ("text:someone/prose:hard",)]


@pytest.mark.parametrize(
    ("specification", "message"),
    [
        ("tex:a.txt", r"no task 'tex:a.txt'\. Did you mean 'text'\? Known tasks: wikitext2, text:FILE, kl"),
        ("kl:", r"write kl\[:FILE\]"),
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
        needs_reference = False

        def __init__(self, name: str) -> None:
            self.names = (name,)

        def prepare(self, options: TaskOptions) -> None: ...

        def data_keys(self) -> dict[str, str]:
            return {self.names[0]: "constant"}

        def select(self, names: Sequence[str]) -> Constant:
            return self

        def run(self, model: object, tokenizer: object, options: TaskOptions) -> dict[str, list[TaskResult]]:
            return {self.names[0]: [result_of(0.25)]}

    register_task("accuracy", argument="NAME")(lambda argument: Constant(f"accuracy:{argument}"))
    (task,) = parse_tasks("accuracy:boolq")
    assert task.names == ("accuracy:boolq",)
    with pytest.raises(UsageError, match="accuracy:NAME"):
        parse_tasks("acc:boolq")


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
    ((result,),) = task.run(model, tokenizer, options).values()

    windows = evaluation_windows(tokenizer, [tiny_text_file.read_text(encoding="utf-8")], 64, 3)
    expected = perplexity(model, windows)
    assert result.headline.value == result.details["perplexity"] == expected.perplexity
    assert result.details["num_tokens"] == 3 * 63
    assert result.data_fingerprint == data_fingerprint(windows)
    assert "first 3 consecutive windows of 64 tokens" in result.convention
    assert said[-1] == (3, 3, f"perplexity {expected.perplexity:.2f}")


@pytest.mark.parametrize(
    ("model_type", "bos", "begins"),
    [("gemma3_text", "auto", True), ("gemma3_text", "never", False), ("llama", "auto", False)],
)
def test_windows_begin_with_bos_where_the_family_needs_it(
    model_type: str, bos: BosChoice, begins: bool, tiny_llama_dir: Path, tiny_text_file: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(1)
    options = TaskOptions(sequence_length=64, limit=3, bos=bos)
    (task,) = parse_tasks(f"text:{tiny_text_file}")
    task.prepare(options)
    ((result,),) = task.run(tiny_model(model_type), tokenizer, options).values()
    text = [tiny_text_file.read_text(encoding="utf-8")]
    windows = evaluation_windows(tokenizer, text, 64, 3, 1 if begins else None)
    assert result.data_fingerprint == data_fingerprint(windows)
    assert ("tokens (the BOS token and 63 of text)" in result.convention) == begins


def test_window_beyond_the_context_is_a_usage_error(tiny_llama_dir: Path, tiny_text_file: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    (task,) = parse_tasks(f"text:{tiny_text_file}")
    options = TaskOptions(sequence_length=4096)
    task.prepare(options)
    with pytest.raises(UsageError, match="--sequence-length 2048 or less"):
        task.run(model, AutoTokenizer.from_pretrained(tiny_llama_dir), options)


def test_data_key_changes_with_the_text(tmp_path: Path) -> None:
    keys = []
    for text in ("one two", "one two", "one tow"):
        (tmp_path / "a.txt").write_text(text)
        (task,) = parse_tasks(f"text:{tmp_path / 'a.txt'}")
        task.prepare(TaskOptions())
        keys.append(task.data_keys()[task.names[0]])
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(
    ("metric", "reference", "value", "difference", "recovery"),
    [("perplexity", 10.0, 12.0, 2.0, 1.2), ("acc", 0.5, 0.4, -0.1, 0.8), ("acc", 0.0, 0.4, 0.4, None)],
)
def test_difference_and_recovery(
    metric: str, reference: float, value: float, difference: float, recovery: float | None
) -> None:
    report = report_of(reference, value, metric=metric)
    (one,) = report.compare(report.models[1], "wikitext2")
    assert one.difference == pytest.approx(difference)
    assert one.recovery == (None if recovery is None else pytest.approx(recovery))
    alone = EvaluationReport(report.models[:1])
    assert alone.compare(alone.models[0], "wikitext2")[0].difference is None


def test_a_divergence_has_no_recovery() -> None:
    assert Metric("kl_mean", 0.2, higher_is_better=False, relative=True).recovery(0.1) is None


def test_average_is_over_the_headline_accuracies() -> None:
    results = (
        result_of(21.0),
        result_of(0.25, task="a", metric="acc_norm"),
        result_of(0.5, task="b", metric="acc"),
    )
    model = ModelReport("in", "cpu", "float32", None, results)
    average = EvaluationReport.of([model]).models[0].result("average")
    assert average is not None
    assert average.headline.value == 0.375
    assert "a (acc_norm), b (acc)" in average.convention
    alone = ModelReport("in", "cpu", "float32", None, results[:2])
    assert EvaluationReport.of([alone]).tasks() == ["wikitext2", "a"]


def test_results_survive_json() -> None:
    result = result_of(0.25, metric="acc")
    assert TaskResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_report_is_json_even_of_broken_numbers(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    write_json(file, report_of(math.inf, math.nan).to_dict())
    document = json.loads(file.read_text(), parse_constant=pytest.fail)
    values = [model["results"][0]["metrics"][0]["value"] for model in document["models"]]
    assert values == ["Infinity", "NaN"]
    assert document["models"][0]["results"][0]["details"] == {"n": 3}
    assert document["reference"] == "in"
    assert document["comparison"][0]["recovery"] == "NaN"
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
