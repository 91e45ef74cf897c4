"""All that the command line writes goes through here: results to stdout, everything else to stderr."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.filesize import decimal
from rich.text import Text

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = [
    "examples",
    "human_bytes",
    "human_seconds",
    "print_note",
    "print_warning",
    "printable",
    "progress_bar",
    "quiet_libraries",
    "show_warnings",
    "stderr",
    "stdout",
]

stdout = Console()
stderr = Console(stderr=True)

SECONDS_BETWEEN_LINES = 30.0
"""Of a long command whose progress goes into a pipe or a file."""

_PACKAGE = Path(__file__).resolve().parents[1]


def progress_bar(*, shown: bool = True) -> Progress:
    """Return a progress display on stderr: description, bar, count, time elapsed ``<`` time left.

    A task added with ``total=None`` shows a pulse until its total is known. Where stderr is no terminal,
    nothing can be drawn over; then a line says what is being done at the first step and every half minute.
    """
    import time
    from typing import Any

    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    class Lines(Progress):
        """Says a line at times, where nothing can be drawn."""

        said = -math.inf

        def update(self, task_id: TaskID, **changes: Any) -> None:
            super().update(task_id, **changes)
            now = time.monotonic()
            if self.disable or self.console.is_terminal or now - self.said < SECONDS_BETWEEN_LINES:
                return
            self.said = now
            task = next(task for task in self.tasks if task.id == task_id)
            count = "" if task.total is None else f" ({task.completed:.0f} of {task.total:.0f})"
            line = f"{task.description}{count}, {human_seconds(task.elapsed or 0)}"
            self.console.print(printable(line), soft_wrap=True)

    return Lines(
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TextColumn("<", style="dim"),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        console=stderr,
        disable=not shown,
    )


def human_bytes(count: int) -> str:
    """Return a size in decimal units, as the Hub shows it: ``269.1 MB``."""
    return decimal(count, precision=1)


def human_seconds(seconds: float) -> str:
    """Return a duration: ``0.42 s``, ``12.3 s``, ``4 min 05 s``, ``1 h 02 min``."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def examples(*commands: str) -> str:
    """Return the epilog of a command's help: example command lines, each on a line of its own."""
    return "\n\n".join(["[bold]Examples[/bold]", *(f"$ {command}" for command in commands)])


def printable(text: str) -> Text:
    """Text from a file, as it is: no markup, and no control characters, which a terminal would obey."""
    return Text("".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text))


def print_note(message: str) -> None:
    """Say something in passing, on stderr."""
    stderr.print(Text(message, style="dim"), soft_wrap=True)


def print_warning(message: str) -> None:
    """Print ``Warning: message`` on stderr."""
    stderr.print(Text.assemble(("Warning: ", "bold yellow"), message), soft_wrap=True)


def show_warnings(*, debug: bool) -> None:
    """Print the warnings that rrsq itself raises as one line each; those of libraries only with ``debug``."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if Path(filename).resolve().is_relative_to(_PACKAGE):
            print_warning(str(message))
        elif debug:
            print_warning(f"{filename}: {category.__name__}: {message}")

    warnings.showwarning = show
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TQDM_DISABLE", "1")


def quiet_libraries() -> None:
    """Switch off the progress bars of transformers, which would break into ours. Imports transformers."""
    from transformers.utils import logging

    logging.disable_progress_bar()
