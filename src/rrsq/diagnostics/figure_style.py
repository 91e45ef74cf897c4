"""How the figures look, drawn with matplotlib without any global state of it."""

from __future__ import annotations

import io
from typing import Any

from matplotlib import rc_context
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .outliers import OutlierReport

__all__ = ["FIGURE_STYLE", "magnitude_norm", "plain_numbers", "stage_titles", "to_png"]

FIGURE_STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
_DPI = 140
_FLOOR = 0.5
_LONG_AXIS = 100.0


def to_png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    with rc_context(FIGURE_STYLE):
        figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def stage_titles(report: OutlierReport, input_name: str) -> tuple[str, str, str]:
    """What the three stages of an input are called; stages that the recipe leaves out say so."""
    recipe = report.manifest.recipe
    smoothing = recipe.activations.smoothing
    smoothed = smoothing is not None and input_name in smoothing.inputs
    return (
        "before rotation",
        "rotation: none in this recipe" if recipe.rotation is None else "after rotation",
        "after runtime smoothing" if smoothed else "smoothing: none of this input",
    )


def magnitude_norm(largest: float) -> LogNorm:
    """The colour scale of magnitudes up to ``largest``, in units of a token's root mean square."""
    return LogNorm(_FLOOR, max(largest, 10 * _FLOOR), clip=True)


def plain_numbers(axis: Axis, largest: float) -> None:
    """Label a logarithmic axis that ends near ``largest``: 1, 2, 5, 10, or 1, 100, 10,000 on a long one."""
    if largest < _LONG_AXIS:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(_plain))
    axis.set_minor_formatter(NullFormatter())


def _plain(value: float, position: int | None) -> str:
    return f"{value:g}" if value < 1000 else f"{value:,.0f}"
