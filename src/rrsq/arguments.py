"""Arguments of the Python functions, checked as the command line's parser checks its own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import ArgumentError

__all__ = [
    "DTYPES",
    "MOST",
    "check_choice",
    "check_integer",
    "check_path",
    "check_target",
    "integers",
    "texts",
]

DTYPES = ("auto", "bfloat16", "float16", "float32")
"""What the numbers of a model that are not quantized may be."""
MOST = 2**63 - 1
"""The largest integer of torch."""
_LONGEST = 255  # Of a file's or folder's name, on all systems in use.


def check_integer(name: str, value: Any, least: int, most: int = MOST) -> None:
    """Raises :class:`ArgumentError` for what is no integer between the two."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ArgumentError(name, f"is {_shown(value)}, and must be an integer.")
    if value < least:
        raise ArgumentError(name, f"is {value}, and must be at least {least}.")
    if value > most:
        raise ArgumentError(name, f"is more than {most}.")


def integers(name: str, value: Any, least: int, most: int = MOST) -> tuple[int, ...]:
    """Several integers, each as :func:`check_integer` has it; one alone is as good as a list of one."""
    several = value if isinstance(value, Iterable) and not isinstance(value, str | bytes) else (value,)
    several = tuple(several)
    if not several:
        raise ArgumentError(name, "is empty, and must have one number at least.")
    for number in several:
        check_integer(name, number, least, most)
    return several


def check_target(name: str, value: Any) -> float | None:
    """A number of bits, or None. Raises :class:`ArgumentError` for what is no number above zero."""
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ArgumentError(name, f"is {_shown(value)}, and must be a number of bits above zero.")
    return float(value)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises :class:`ArgumentError` for what is none of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ArgumentError(name, f"is {_shown(value)}, and must be one of {', '.join(choices)}.")


def check_path(name: str, value: Any) -> None:
    """Raises :class:`ArgumentError` for what names neither a file nor anything on the Hub."""
    if not isinstance(value, str | Path):
        raise ArgumentError(name, f"is {_shown(value)}, and must be a path or a name.")
    if not str(value).strip() or "\0" in str(value):
        raise ArgumentError(name, f"is {_shown(str(value))}, which names nothing.")
    if any(len(part.encode()) > _LONGEST for part in Path(value).parts):
        raise ArgumentError(name, f"is {value!s:.60}..., and a name may have {_LONGEST} bytes at most.")


def texts(name: str, value: Any) -> tuple[str, ...]:
    """Several texts; one alone is a list of one. Raises :class:`ArgumentError` for anything else."""
    several = (value,) if isinstance(value, str) else value
    if isinstance(several, Iterable):
        several = tuple(several)
        if all(isinstance(text, str) for text in several):
            return several
    raise ArgumentError(name, f"is {_shown(value)}, and must be texts.")


def _shown(value: Any) -> str:
    return f"{value!r:.100}"
