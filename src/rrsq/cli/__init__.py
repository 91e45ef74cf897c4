"""The command line. Importing it is cheap: torch and its kin are imported by a command when it runs."""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Console entry point: run ``rrsq`` with ``sys.argv`` and exit with 0, 1 (failure) or 2 (usage)."""
    from rrsq.cli.app import app

    app(prog_name="rrsq")
