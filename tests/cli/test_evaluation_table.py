"""The table of an evaluation in 80 columns, where nothing is a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

import rrsq.cli.recipes as recipes_module
from rrsq.cli import evaluation_table as module
from rrsq.cli.evaluation_table import evaluation_table, short_names
from rrsq.evaluation.results import Metric, TaskResult
from rrsq.evaluation.scores import EvaluationReport, ModelReport
from rrsq.recipe import load_recipe, recipe_names


def test_names_are_short_and_differ() -> None:
    paths = ["/data/models/MODEL/", "/tmp/rrs/checkpoint", "/tmp/quarot/checkpoint", "org/name"]
    assert list(short_names(paths).values()) == ["MODEL", "rrs/checkpoint", "quarot/checkpoint", "name"]
    assert short_names(["a", "b/a"]) == {"a": "a", "b/a": "b/a"}


def test_eighty_columns_hold_every_number_and_name(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    monkeypatch.setattr(module, "stdout", console)
    paths = ["/tmp/some/where/MODEL", "/tmp/some/where/rrs-w4a4kv4", "/tmp/some/where/quarot-w4a4kv4"]

    def results(value: float) -> tuple[TaskResult, ...]:
        several = {
            "wikitext2": Metric("perplexity", value, higher_is_better=False),
            "winogrande": Metric("acc_norm", value / 100, higher_is_better=True, stderr=0.0123),
        }
        return tuple(TaskResult(task, (one,), "c", 1.0, "same") for task, one in several.items())

    models = [ModelReport(path, "cpu", "float32", None, results(44.1 + i)) for i, path in enumerate(paths)]
    console.print(evaluation_table(EvaluationReport.of(models)))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines]
    for name in ("MODEL", "rrs-w4a4kv4", "quarot-w4a4kv4"):
        assert sum(name in row for row in rows) == 2
    text = console.file.getvalue()
    assert "46.1000" in text
    assert "\N{HORIZONTAL ELLIPSIS}" not in text


def test_names_of_a_comparison_stand_whole_in_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    monkeypatch.setattr(module, "stdout", console)
    names = ["full-precision", "full-precision@bfloat16", "rrs-paper-w4a4kv4@kv16"]
    metrics = (
        Metric("kl_median", 0.1234, higher_is_better=False, stderr=0.0123, relative=True),
        Metric("top1", 0.9, higher_is_better=True, stderr=0.001, relative=True),
    )
    perplexity = TaskResult("wikitext2", (Metric("perplexity", 10829.4, False),), "c", 1.0, "same")
    results = [(perplexity,), *[(perplexity, TaskResult("kl", metrics, "c", 1.0, "same"))] * 2]
    models = [
        ModelReport(name, "cpu", "float32", None, one) for name, one in zip(names, results, strict=True)
    ]
    console.print(evaluation_table(EvaluationReport.of(models)))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines]
    assert [sum(name in row for row in rows) for name in names] == [1, 3, 3]
    assert console.file.getvalue().count("0.1234 ±0.0123") == 2


def test_recipes_are_described_whole_in_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(recipes_module, "stdout", Console(file=file, width=80, force_terminal=False))
    recipes_module.recipes(None, fields=False, markdown=False)
    output = file.getvalue()
    assert max(map(len, output.splitlines())) <= 80
    words = set(output.split())
    for name in recipe_names():
        assert set(load_recipe(name).description.split()) <= words
