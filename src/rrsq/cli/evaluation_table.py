"""The table that ``rrsq eval`` prints."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from rrsq.cli.console import human_seconds, stdout
from rrsq.evaluation.scores import Difference, EvaluationReport, ModelReport, recovery_text, value_text

__all__ = ["evaluation_table", "short_names"]

WIDE = 100
"""Columns from which names stand unfolded."""
NARROW_TASK = 14
"""Columns that a task's name gets below that."""


def evaluation_table(report: EvaluationReport) -> Table:
    """Return a table with a row for each task, metric and model; beside a reference, what differs.

    In a terminal or pipe of 80 columns only long names are folded, and never into less than a word.
    """
    first = report.models[0]
    compared = report.reference is not None
    names = short_names([model.model for model in report.models])
    by_task = [_task_rows(report, task, names) for task in report.tasks()]
    last = ("change", "recovery") if compared else ("time",)
    table = Table(
        title=f"{first.device}, {first.dtype}",
        title_justify="left",
        title_style="dim",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("task", overflow="fold", max_width=24 if stdout.width >= WIDE else NARROW_TASK)
    table.add_column("metric", no_wrap=True)
    table.add_column("model", overflow="fold", width=_name_width(by_task, last))
    table.add_column("value", justify="right", no_wrap=True)
    for name in last:
        table.add_column(name, justify="right", no_wrap=True)
    for rows in by_task:
        for row in rows:
            table.add_row(*map(Text, row))
        table.add_section()
    return table


def _name_width(by_task: list[list[list[str]]], last: tuple[str, ...]) -> int:
    """Columns for names: all they need, or what the numbers leave of a narrow terminal, 20 at least."""
    headings = ["task", "metric", "model", "value", *last]
    columns = list(zip(headings, *(row for rows in by_task for row in rows), strict=True))
    task, *widths = (max(map(len, column)) for column in columns)
    longest = widths.pop(1)
    if stdout.width >= WIDE:
        return longest
    left = stdout.width - min(task, NARROW_TASK) - sum(widths) - len(headings)
    return min(longest, max(left, 20))


def short_names(paths: list[str]) -> dict[str, str]:
    """The last part of each path, with as many parts before it as make it differ from all others."""
    parts = {path: path.rstrip("/").split("/") for path in paths}

    def end(path: str, count: int) -> str:
        return "/".join(parts[path][-count:]) or path

    def name(path: str) -> str:
        lengths = range(1, len(parts[path]) + 1)
        others = [other for other in parts if other != path]
        unlike = (n for n in lengths if all(end(other, n) != end(path, n) for other in others))
        return end(path, next(unlike, len(parts[path])))

    return {path: name(path) for path in parts}


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
