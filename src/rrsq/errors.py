"""What can go wrong, as types.

Every error a user can cause or meet derives from :class:`RRSQError`. Its message says what was wrong,
where, and what to do next; the command line prints it and exits with :attr:`RRSQError.exit_code`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ArgumentError",
    "CalibrationError",
    "CheckpointError",
    "DataError",
    "EngineError",
    "ExportError",
    "HadamardOrderError",
    "HubError",
    "InterruptedRunError",
    "KernelUnavailableError",
    "ModelLoadError",
    "NonFiniteError",
    "OutputExistsError",
    "RRSQError",
    "RecipeError",
    "ResumeError",
    "StorageError",
    "UnsupportedArchitectureError",
    "UsageError",
    "did_you_mean",
]


class RRSQError(Exception):
    """Base of all errors that rrsq raises on purpose. Exit code 1: the run failed."""

    exit_code = 1


class UsageError(RRSQError):
    """The request itself is wrong (an option, a name, a path). Exit code 2."""

    exit_code = 2


class ArgumentError(UsageError):
    """An argument is not what it must be.

    Attributes:
        argument: its name in Python; the command line has another, and says that.
        problem: what is wrong with it, as the words behind its name.
    """

    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(argument, problem)
        self.argument, self.problem = argument, problem

    def __str__(self) -> str:
        return f"{self.argument} {self.problem}"


class RecipeError(UsageError):
    """A recipe that does not exist, does not parse, or asks for something impossible."""


class OutputExistsError(UsageError):
    """The output folder is already there and overwriting was not asked for."""


class ResumeError(UsageError):
    """An unfinished run of the same output is of another recipe, model or text."""


class ModelLoadError(UsageError):
    """The model (or its tokenizer) cannot be found or read."""


class UnsupportedArchitectureError(UsageError):
    """The model's architecture has no family specification."""


class DataError(UsageError):
    """A data set or text file cannot be found, reached or used."""


class CalibrationError(UsageError):
    """A calibration folder is damaged, of another model, or lacks what the recipe needs."""


class ExportError(UsageError):
    """A checkpoint holds what the other format, or who reads it, has no place for."""


class NonFiniteError(RRSQError):
    """A tensor holds NaN or Inf where numbers are needed."""


class HadamardOrderError(RRSQError):
    """No Hadamard matrix of the order asked for can be constructed."""


class CheckpointError(RRSQError):
    """A checkpoint is damaged, incomplete, or of a format this version does not know."""


class StorageError(RRSQError):
    """Writing failed: disk full, read-only target, no permission."""


class HubError(RRSQError):
    """The Hugging Face Hub cannot be reached, or refuses a request."""


class InterruptedRunError(RRSQError):
    """The user stopped the run."""


class EngineError(RRSQError):
    """An inference engine (vLLM) did not start, or stopped."""

    @classmethod
    def of(cls, what: str, error: BaseException) -> EngineError:
        """Say what failed, and the first line of why."""
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return cls(f"{what}: {type(error).__name__}: {lines[0] if lines else 'no message'}")


class KernelUnavailableError(RRSQError):
    """No registered kernel can serve a call; the message lists each candidate and its reason."""


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the candidate nearest to ``word``, or an empty string."""
    close = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""
