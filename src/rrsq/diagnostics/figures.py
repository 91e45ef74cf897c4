"""Figures over all layers of a model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .analysis import STAGES
from .figure_style import FIGURE_STYLE, magnitude_norm, plain_numbers, stage_titles
from .outliers import InputRow, OutlierReport

__all__ = ["channels_figure", "errors_figure", "ratios_figure", "tokens_figure"]

# Colours of Okabe and Ito, told apart by every kind of colour vision; markers tell them apart in grey.
_ERROR_LINES = (
    ("activations and weights", "#000000", "o", lambda row: 100 * row.output_error),
    ("activations only", "#0072B2", "s", lambda row: 100 * row.activation_error),
    ("weights only (round to nearest)", "#D55E00", "^", lambda row: 100 * row.weight_error),
)
_RATIO_LINES = (
    ("before rotation", "#D55E00", "o", lambda row: row.ratio["original"]),
    ("after rotation", "#0072B2", "s", lambda row: row.ratio["rotated"]),
    ("after runtime smoothing", "#009E73", "^", lambda row: row.ratio["smoothed"]),
)
# Cells wide enough for a single spike to be seen.
_CHANNEL_CELLS, _TOKEN_CELLS = 128, 64

_Lines = tuple[tuple[str, str, str, Callable[[InputRow], float]], ...]


def errors_figure(report: OutlierReport) -> Figure:
    """Output error of each layer, a panel an input."""
    figure, panels = _line_panels(report, "Output error when quantized", _ERROR_LINES, "‖Δy‖ / ‖y‖ (%)")
    panels[0].set_ylim(bottom=0)
    return figure


def ratios_figure(report: OutlierReport) -> Figure:
    """The ratio max/RMS of each layer at the three stages, a panel an input."""
    figure, panels = _line_panels(
        report, "How far a token's largest value stands out", _RATIO_LINES, "max / RMS, mean over tokens"
    )
    panels[0].set_yscale("log")
    panels[0].set_ylim(bottom=1)
    for axes in panels:
        plain_numbers(axes.yaxis, axes.get_ylim()[1])
    return figure


def channels_figure(report: OutlierReport) -> Figure:
    """Channel-wise outliers: layers by channels, a row an input, a column a stage."""
    return _maps(report, "Channel-wise outliers", "channel_absmax", "channel", _CHANNEL_CELLS)


def tokens_figure(report: OutlierReport) -> Figure:
    """Spike tokens: layers by positions of the first window, a row an input, a column a stage."""
    return _maps(report, "Spike tokens", "token_absmax", "token position in the first window", _TOKEN_CELLS)


def _line_panels(report: OutlierReport, title: str, lines: _Lines, unit: str) -> tuple[Figure, list[Axes]]:
    """A line over layers of each value, in a panel an input; the panels share both axes."""
    names = list(report.manifest.inputs)
    rows = -(-len(names) // 2)
    with rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(10, 0.9 + 2.6 * rows), layout="constrained")
        figure.suptitle(title)
        grid = list(figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False).flatten())
        for spare in grid[len(names) :]:
            spare.set_axis_off()
        panels = grid[: len(names)]
        for name, axes in zip(names, panels, strict=True):
            entries = report.of_input(name)
            layers = [row.layer for row in entries]
            for label, colour, marker, value in lines:
                values = [value(row) for row in entries]
                axes.plot(layers, values, color=colour, marker=marker, ms=3.5, lw=1.3, label=label)
            axes.set_title(f"{name} input", loc="left")
            axes.set_ylabel(unit)
            axes.grid(True)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.tick_params(labelleft=True, labelbottom=True)
        for axes in panels[-2:]:
            axes.set_xlabel("layer")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure, panels


def _maps(report: OutlierReport, title: str, what: str, horizontal: str, cells: int) -> Figure:
    """Layers by channels or tokens as colour, with a colour scale an input."""
    names = list(report.manifest.inputs)
    with rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(10, 0.9 + 2.1 * len(names)), layout="constrained")
        figure.suptitle(title)
        grid = figure.subplots(len(names), len(STAGES), sharey=True, squeeze=False)
        for name, line in zip(names, grid, strict=True):
            values, width = _by_layer(report, name, what, cells)
            largest = float(values.max())
            norm = magnitude_norm(largest)
            for axes, stage, stage_title in zip(line, values, stage_titles(report, name), strict=True):
                image = axes.imshow(
                    stage,
                    norm=norm,
                    cmap="viridis",
                    aspect="auto",
                    extent=(0, width, report.manifest.layers - 0.5, -0.5),
                    interpolation="nearest",
                )
                axes.set_title(stage_title, loc="left")
                axes.yaxis.set_major_locator(MaxNLocator(integer=True))
            line[0].set_ylabel(f"{name} input\nlayer")
            bar = figure.colorbar(image, ax=list(line), label="largest |x| / RMS", aspect=12, extend="min")
            plain_numbers(bar.ax.yaxis, largest)
        for axes in grid[-1]:
            axes.set_xlabel(horizontal)
    return figure


def _by_layer(report: OutlierReport, name: str, what: str, cells: int) -> tuple[np.ndarray, int]:
    """Profiles ``[stages, layers, cells]``, a cell being the largest of its channels, and their number."""
    profiles = torch.stack([report.profile(row, what) for row in report.of_input(name)], dim=1)
    width = profiles.shape[-1]
    return torch.nn.functional.adaptive_max_pool1d(profiles, min(width, cells)).numpy(), width
