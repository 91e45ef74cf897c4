"""The table that ``rrsq eval`` prints."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from rrsq.cli.console import human_seconds
from rrsq.evaluation.scores import Difference, EvaluationReport, ModelReport, recovery_text, value_text

__all__ = ["evaluation_table", "short_names"]


def evaluation_table(report: EvaluationReport) -> Table:
    """Return a table with a row for each task, metric and model; beside a reference, what differs."""
    first = report.models[0]
    compared = report.reference is not None
    names = short_names([model.model for model in report.models])
    table = Table(
        title=f"{first.device}, {first.dtype}",
        title_justify="left",
        title_style="dim",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("task", overflow="fold", max_width=24)
    table.add_column("metric", no_wrap=True)
    table.add_column("model", overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    for name in ("change", "recovery") if compared else ("time",):
        table.add_column(name, justify="right", no_wrap=True)
    for task in report.tasks():
        for row in _task_rows(report, task, names):
            table.add_row(*map(Text, row))
        table.add_section()
    return table


def short_names(paths: list[str]) -> dict[str, str]:
    """The last part of each path, or the whole path where two would look alike."""
    last = {path: path.rstrip("/").rsplit("/", 1)[-1] or path for path in paths}
    return {
        path: name if list(last.values()).count(name) == 1 else path.rstrip("/")
        for path, name in last.items()
    }


def _task_rows(report: EvaluationReport, task: str, names: dict[str, str]) -> list[list[str]]:
    """The rows of a task: its metrics in turn, each on all models."""
    columns: list[tuple[ModelReport, list[Difference]]] = [
        (model, report.compare(model, task)) for model in report.models
    ]
    rows: list[list[str]] = []
    longest = max(len(differences) for _, differences in columns)
    for number in range(longest):
        for model, differences in columns:
            if number >= len(differences):
                continue
            one = differences[number]
            result = model.result(task)
            cells = [task if not rows else "", one.metric.name if not _repeats(rows, one) else ""]
            cells += [names[model.model], value_text(one.metric)]
            if report.reference is not None:
                cells += ["", ""] if model is report.reference else _difference_cells(one)
            elif result is not None:
                cells.append(human_seconds(result.seconds) if number == 0 and result.seconds else "")
            rows.append(cells)
    return rows


def _repeats(rows: list[list[str]], one: Difference) -> bool:
    return one.metric.name == next((row[1] for row in reversed(rows) if row[1]), None)


def _difference_cells(one: Difference) -> list[str]:
    return ["" if one.difference is None else f"{one.difference:+.4f}", recovery_text(one)]
