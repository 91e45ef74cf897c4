"""The table that ``rrsq eval`` prints."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from rrsq.cli.console import human_seconds
from rrsq.evaluation.report import EvaluationReport

__all__ = ["evaluation_table"]


def evaluation_table(report: EvaluationReport) -> Table:
    """Return a table with a row for each task and model; with a baseline, also the model's ratio to it."""
    measured = report.model
    table = Table(title=f"{measured.device}, {measured.dtype}", title_justify="left", title_style="dim")
    table.add_column("task", overflow="fold")
    table.add_column("model", overflow="fold")
    table.add_column("metric")
    table.add_column("value", justify="right")
    if report.baseline is not None:
        table.add_column("ratio", justify="right")
    table.add_column("time", justify="right")
    for index, result in enumerate(measured.results):
        ratio = report.ratio(result.task)
        row = [result.task, measured.model, result.metric, f"{result.value:.4f}"]
        ratio_cell = [] if report.baseline is None else ["-" if ratio is None else f"{ratio:.4f}"]
        time = human_seconds(result.seconds)
        table.add_row(*map(Text, [*row, *ratio_cell, time]), end_section=report.baseline is None)
        if report.baseline is not None:
            other = report.baseline.results[index]
            row = ["", report.baseline.model, other.metric, f"{other.value:.4f}", "1.0000"]
            table.add_row(*map(Text, [*row, human_seconds(other.seconds)]), style="dim", end_section=True)
    return table
