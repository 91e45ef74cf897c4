"""The progress of a quantization: one bar for the model and one for the layer at hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["QuantizationBars"]


class QuantizationBars:
    """Two bars in a progress display; the layer's appears with the first layer.

    Args:
        progress: the display, already started.
        description: what is done before the first step is reported.
        label: put in front of what the upper bar says, to tell one model or recipe from another.
    """

    def __init__(self, progress: Progress, description: str, label: str = "") -> None:
        self._progress = progress
        self._label = label
        self._whole = progress.add_task(label + description, total=None)
        self._layer = progress.add_task("layer", total=None, visible=False)
        self._at = ""

    def show(self, done: int, total: int, per_layer: int, text: str) -> None:
        """Take a step; see :data:`rrsq.quantizer.production.produce.StepCallback`."""
        if not total:
            self._progress.update(self._whole, description=self._label + text)
            self._progress.update(self._layer, visible=False)
            return
        layer = text.partition(":")[0]
        if layer != self._at:
            self._at = layer
            self._progress.reset(self._layer, total=per_layer, visible=True)
        self._progress.update(self._layer, advance=1, description=text)
        self._progress.update(
            self._whole, completed=done, total=total, description=f"{self._label}quantizing"
        )

    def finish(self) -> None:
        """Say that all is done."""
        self._progress.update(self._whole, description=f"{self._label}done")
