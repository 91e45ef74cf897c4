"""One linear input in detail: tokens by channels at the three stages, as the paper draws them."""

from __future__ import annotations

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .analysis import STAGES
from .figure_style import FIGURE_STYLE, magnitude_norm, plain_numbers, stage_titles
from .outliers import InputRow, OutlierReport

__all__ = ["detail_figure"]

_COLOUR, _TOP_COLOUR = "#0072B2", "#D55E00"
_STANDS_OUT = 2.0


def detail_figure(report: OutlierReport, row: InputRow) -> Figure:
    """``|x|`` of the first window, and the largest magnitudes by channel and by token; a column a stage.

    The heat maps show what the surfaces of arXiv 2409.20361 show, and no cell of them hides another.
    """
    magnitudes, channels, tokens = (
        report.profile(row, what).numpy() for what in ("magnitudes", "channel_absmax", "token_absmax")
    )
    largest = max(float(profile.max()) for profile in (channels, tokens))
    extent = (0, channels.shape[1], tokens.shape[1], 0)
    with rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(10, 6), layout="constrained")
        figure.suptitle(f"Layer {row.layer}, {row.input} input")
        grid = figure.subplots(3, len(STAGES), sharey="row", height_ratios=(5, 3, 3), squeeze=False)
        norm = magnitude_norm(float(magnitudes.max()))
        for stage, title in enumerate(stage_titles(report, row.input)):
            heat, by_channel, by_token = grid[:, stage]
            image = heat.imshow(
                magnitudes[stage],
                norm=norm,
                cmap="viridis",
                aspect="auto",
                extent=extent,
                interpolation="nearest",
            )
            heat.set_title(title, loc="left")
            heat.set_xlabel("channel")
            _profile(by_channel, channels[stage], largest, "channel")
            _profile(by_token, tokens[stage], largest, "token position")
        grid[0, 0].set_ylabel("token position")
        grid[1, 0].set_ylabel("largest |x| / RMS\nof a channel")
        grid[2, 0].set_ylabel("largest |x| / RMS\nof a token")
        bar = figure.colorbar(image, ax=list(grid[0]), label="|x| / RMS", extend="min")
        plain_numbers(bar.ax.yaxis, largest)
    return figure


def _profile(axes: Axes, values: np.ndarray, largest: float, horizontal: str) -> None:
    axes.plot(values, color=_COLOUR, linewidth=0.8)
    top = int(values.argmax())
    if values[top] > _STANDS_OUT * np.median(values):
        axes.plot(top, values[top], color=_TOP_COLOUR, marker="o", markersize=4)
    axes.set_yscale("log")
    axes.set_ylim(0.5, 2 * largest)
    # A margin, so that a spike at the first position stands off the axis.
    axes.set_xlim(-0.02 * len(values), 1.02 * len(values))
    axes.grid(True)
    axes.set_xlabel(horizontal)
    plain_numbers(axes.yaxis, largest)
