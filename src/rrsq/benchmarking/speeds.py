"""What a benchmark gives: a table, JSON, a plot."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.table import Table

from .ceilings import Ceilings
from .linear_scheme import LinearScheme
from .measure import Row

__all__ = ["BenchmarkReport", "plot", "tables", "to_json"]

_FEW_TOKENS = 128


@dataclass(frozen=True)
class BenchmarkReport:
    """All rows of a run and the machine they are from."""

    device: str
    command: str
    cuda_graph: bool
    ceilings: Ceilings
    rows: tuple[Row, ...]
    recipe: str
    scheme: LinearScheme
    """What of the recipe the rows of rrsq are."""

    def row(self, shape: str, tokens: int, name: str) -> Row | None:
        """The measurement of a contender, or None."""
        found = (r for r in self.rows if (r.shape, r.tokens, r.name) == (shape, tokens, name))
        return next(found, None)

    def smoothing_overhead(self, shape: str, tokens: int) -> float | None:
        """Relative cost of smoothing in the product: with group scales over without, minus 1."""
        pair = [self.row(shape, tokens, name) for name in ("rrsq", "rrsq-unsmoothed")]
        times = [row.microseconds for row in pair if row is not None and row.microseconds]
        return times[0] / times[1] - 1 if len(times) == 2 else None


def tables(report: BenchmarkReport) -> list[Table]:
    """One rich table a shape."""
    return [_table(report, shape) for shape in dict.fromkeys(row.shape for row in report.rows)]


def _table(report: BenchmarkReport, shape: str) -> Table:
    table = Table(title=shape, title_justify="left", title_style="bold")
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("")
    for heading in ("µs", "× bf16", "rate", "of ceiling", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = [row for row in report.rows if row.shape == shape]
    for tokens in dict.fromkeys(row.tokens for row in rows):
        for index, row in enumerate(row for row in rows if row.tokens == tokens):
            style = "dim" if row.microseconds is None else "bold" if row.name == "rrsq" else None
            table.add_row(str(tokens) if index == 0 else "", *_cells(row), style=style)
        overhead = report.smoothing_overhead(shape, tokens)
        if overhead is not None:
            table.add_row("", "smoothing's share of rrsq", "", f"{overhead:+.1%}", style="dim")
        table.add_section()
    return table


def _cells(row: Row) -> list[str]:
    if row.microseconds is None:
        return [f"{row.name}: {row.reason}"]
    return [
        row.name,
        f"{row.microseconds:.1f}",
        "" if row.ratio is None else f"{row.ratio:.2f}",
        _rate(row),
        "" if row.ceiling_share is None else f"{row.ceiling_share:.0%}",
        "" if row.error is None else f"{row.error:.0e}",
    ]


def _rate(row: Row) -> str:
    """Arithmetic where it binds (many tokens), bandwidth where that does."""
    if row.teraflops is not None and row.tokens > _FEW_TOKENS:
        return f"{row.teraflops:.1f} TFLOP/s"
    return "" if row.gigabytes_per_second is None else f"{row.gigabytes_per_second:.0f} GB/s"


def to_json(report: BenchmarkReport) -> str:
    """All of the report, with the versions it was measured with."""
    return json.dumps({**asdict(report), "torch": torch.__version__, "triton": _triton_version()}, indent=2)


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def plot(report: BenchmarkReport, path: Path) -> None:
    """Write a figure: ratios to bfloat16 as bars, and all products under the measured roofline."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys(row.shape for row in report.rows))
    figure, axes = plt.subplots(1, len(shapes) + 1, figsize=(5 * (len(shapes) + 1), 4), squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=False):
        rows = [row for row in report.rows if row.shape == shape and row.ratio is not None]
        names = [name for name in dict.fromkeys(row.name for row in rows) if name != "cublas"]
        tokens = list(dict.fromkeys(row.tokens for row in rows))
        for index, name in enumerate(names):
            chosen = [row for row in rows if row.name == name]
            positions = [
                tokens.index(row.tokens) + (index - len(names) / 2) * 0.8 / len(names) for row in chosen
            ]
            axis.bar(positions, [row.ratio or 0.0 for row in chosen], 0.8 / len(names), label=name)
        axis.axhline(1.0, color="black", linewidth=1)
        axis.set_xticks(range(len(tokens)), [str(count) for count in tokens])
        axis.set(title=shape, xlabel="tokens", ylabel="times faster than bfloat16")
        axis.legend(fontsize=7)
    _roofline(axes[0][-1], report)
    figure.suptitle(report.device)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _roofline(axis, report: BenchmarkReport) -> None:  # type: ignore[no-untyped-def]
    bandwidth, peak = report.ceilings.bytes_per_second, report.ceilings.bf16_operations_per_second
    intensities = [2.0**power for power in range(-1, 14)]
    for factor, label in ((1, "bfloat16 ceiling"), (2, "int8 ceiling (twice)")):
        limits = [min(i * bandwidth, factor * peak) / 1e12 for i in intensities]
        axis.plot(intensities, limits, label=label, linewidth=1)
    for name in dict.fromkeys(row.name for row in report.rows):
        rows = [row for row in report.rows if row.name == name and row.teraflops and row.gigabytes_per_second]
        points = [(row.teraflops or 0.0, row.gigabytes_per_second or 1.0) for row in rows]
        axis.scatter(
            [1e3 * flops / size for flops, size in points], [flops for flops, _ in points], s=12, label=name
        )
    axis.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="TFLOP/s", title="roofline")
    axis.legend(fontsize=7)
