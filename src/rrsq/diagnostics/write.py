"""Writing the report of a calibration run: page, pictures and numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from .detail_figure import detail_figure
from .figure_style import to_png
from .figures import channels_figure, errors_figure, ratios_figure, tokens_figure
from .outliers import OutlierReport, write_report_json
from .page import Figures, detail_name, html_page

__all__ = ["write_report"]


def write_report(
    report: OutlierReport, folder: Path, on_figure: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Write ``report.html``, ``report.json`` and ``figures/*.png`` into a folder.

    Args:
        report: what to show.
        folder: exists.
        on_figure: called with the figures drawn and all that will be.
    """
    drawers = {
        "errors": partial(errors_figure, report),
        "ratios": partial(ratios_figure, report),
        "channels": partial(channels_figure, report),
        "tokens": partial(tokens_figure, report),
        **{detail_name(row, rank): partial(detail_figure, report, row) for row, rank in report.detailed},
    }
    (folder / "figures").mkdir(exist_ok=True)
    figures: Figures = {}
    for done, (name, draw) in enumerate(drawers.items(), 1):
        figures[name] = to_png(draw())
        (folder / "figures" / f"{name}.png").write_bytes(figures[name])
        on_figure(done, len(drawers))
    (folder / "report.html").write_text(html_page(report, figures), encoding="utf-8")
    write_report_json(report, folder / "report.json")
