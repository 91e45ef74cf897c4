"""Turn what goes wrong in a command into one message on stderr and an exit code.

1 is a failed run, 2 a wrong request. A traceback is shown only with ``rrsq --debug``.
"""

from __future__ import annotations

import errno
import traceback
from typing import Any

import typer
from rich.text import Text
from typer.core import TyperGroup

from rrsq.cli.console import printable, stderr
from rrsq.errors import ArgumentError, InterruptedRunError, RRSQError

__all__ = ["ErrorReportingGroup", "describe_error"]


class ErrorReportingGroup(TyperGroup):
    """A command group whose commands end in a message and an exit code, never in a stray exception."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; report what it raises and exit."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except (Exception, KeyboardInterrupt) as error:
            if hasattr(error, "show"):  # Typer's own usage errors print themselves, with the command's usage.
                raise
            if ctx.params.get("debug"):
                traceback.print_exception(error)
            label, message, exit_code = describe_error(error)
            if isinstance(error, ArgumentError):
                message = f"{self._named(ctx, error.argument)} {error.problem}"
            stderr.print(Text.assemble((f"{label}: ", "bold red"), printable(message)), soft_wrap=True)
            raise typer.Exit(exit_code) from error

    def _named(self, ctx: Any, argument: str) -> str:
        """An argument of a function as the command line calls it."""
        command = self.commands.get(ctx.invoked_subcommand)
        for parameter in command.params if command is not None else ():
            if parameter.name == argument:
                return next((name for name in parameter.opts if name.startswith("--")), argument)
        return argument


def describe_error(error: BaseException) -> tuple[str, str, int]:
    """Return the label, the message and the exit code for an exception."""
    if isinstance(error, InterruptedRunError):
        return "Interrupted", str(error), error.exit_code
    if _is_interruption(error):
        return "Interrupted", "stopped by the user before it was done.", 1
    if isinstance(error, RRSQError):
        return "Error", str(error), error.exit_code
    if _is_disk_full(error):
        filename = getattr(error, "filename", None)
        where = f" while writing '{filename}'" if filename else ""
        return "Error", f"The disk is full{where}. Free some space, or write to another disk.", 1
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "Error", f"Out of memory. A smaller batch or sequence length needs less. ({_line(error)})", 1
    hint = "Run again with --debug for the traceback: rrsq --debug COMMAND ..."
    return "Unexpected error", f"{type(error).__name__}: {_line(error)}\n{hint}", 1


def _is_interruption(error: BaseException | None) -> bool:
    # An import that is interrupted may raise an exception of its own from it.
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__
    return error is not None


def _is_disk_full(error: BaseException) -> bool:
    # Libraries in other languages (safetensors) report the system's words in an exception of their own.
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"
