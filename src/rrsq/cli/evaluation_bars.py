"""The progress of an evaluation: one bar for each task on each model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["EvaluationBars"]


class EvaluationBars:
    """Bars in a progress display, a new one for each thing that is done.

    Args:
        progress: the display, already started.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._current: tuple[str, str] | None = None
        self._bar = progress.add_task("", total=None)
        self._counted = False

    def say(self, text: str) -> None:
        """Show that something without a count is being done."""
        self._progress.update(self._bar, description=text)

    def show(self, model: str, doing: str, done: int, total: int, so_far: str) -> None:
        """Take a step; see :data:`rrsq.evaluation.run.StepCallback`."""
        if self._current != (model, doing):
            # A bar that has counted stays on the screen; one that only said something is used again.
            if self._counted:
                self._bar = self._progress.add_task("", total=None)
            else:
                self._progress.reset(self._bar, total=None)
            self._current, self._counted = (model, doing), False
        name = model.rstrip("/").rsplit("/", 1)[-1] or model
        label = f"{name}: {doing}" if name else doing
        self._progress.update(self._bar, description=f"{label}, {so_far}" if so_far else label)
        if total:
            self._counted = True
            self._progress.update(self._bar, completed=done, total=total)

    def finish(self) -> None:
        """Take away a bar that never counted."""
        if not self._counted:
            self._progress.remove_task(self._bar)
