"""The command line. Importing it is cheap: torch and its kin are imported by a command when it runs."""

from __future__ import annotations

import signal
from types import FrameType

__all__ = ["main"]


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Console entry point: run ``rrsq`` with ``sys.argv`` and exit with 0, 1 (failure) or 2 (usage).

    A polite kill (SIGTERM) is an interruption like Ctrl-C, so that nothing half-written stays behind.
    """
    from rrsq.cli.app import app

    signal.signal(signal.SIGTERM, _stop)
    app(prog_name="rrsq")
