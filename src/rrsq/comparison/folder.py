"""The folder of a comparison: finished steps and what they were made of.

::

    folder/comparison.json                  which model this folder is for
    folder/report.html, .md, .json          the result
    folder/full-precision/results.json      what each task gave
    folder/full-precision/converted/        what a GGUF file was converted to
    folder/full-precision/cache-means.safetensors
    folder/<recipe>/checkpoint/             an ordinary checkpoint
    folder/<recipe>/quantization.json       what it was made of, and how that went
    folder/<recipe>/results.json
    folder/<recipe>@kv16/results.json       the same checkpoint with another KV cache
    folder/lock                             while a process is at work
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rrsq.errors import OutputExistsError, UsageError
from rrsq.evaluation.scores import jsonable
from rrsq.storage import storage_errors, write_whole
from rrsq.work_folder import LOCK, locked

__all__ = ["FULL_PRECISION", "ComparisonFolder", "Target"]

FULL_PRECISION = "full-precision"
FORMAT = 1
_MARKER = "comparison.json"
# What a process that is killed at once leaves.
_BEGUN = (LOCK, f"{_MARKER}.new")


class Target:
    """One model of a comparison: the full-precision one, or one recipe's.

    Args:
        folder: where its records are kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = folder / "checkpoint"

    def quantization(self) -> dict[str, Any]:
        """The record of a finished quantization; empty if there is none."""
        return _read(self.folder / "quantization.json")

    def results(self) -> dict[str, Any]:
        """The record of finished tasks by name; empty if there is none."""
        return _read(self.folder / "results.json")

    def store_quantization(self, record: Mapping[str, Any]) -> None:
        """Keep the record of a finished quantization."""
        self._write("quantization.json", record)

    def store_results(self, record: Mapping[str, Any]) -> None:
        """Keep the record of finished tasks."""
        self._write("results.json", record)

    def _write(self, name: str, record: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(self.folder / name, jsonable(record))


class ComparisonFolder:
    """The folder itself.

    Args:
        path: of the folder; it may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def opened(self, model: str) -> Iterator[None]:
        """Make the folder, or go on with it; no other process may meanwhile.

        Raises:
            OutputExistsError: it holds something else.
            UsageError: it holds a comparison of another model.
            StorageError: another process is at work on it, or it cannot be written to.
        """
        marker = self.path / _MARKER
        with ExitStack() as stack:
            with storage_errors(self.path):
                if not marker.is_file() and self._holds_something():
                    raise OutputExistsError(
                        f"'{self.path}' exists and is no folder of 'rrsq compare'. Give another folder."
                    )
                stack.enter_context(locked(self.path, self.path))
                before = _read(marker).get("model")
                if before is not None and before != model:
                    raise UsageError(
                        f"'{self.path}' holds a comparison of the model '{before}'. Give another folder for"
                        f" '{model}'."
                    )
                _write(marker, {"format": FORMAT, "model": model})
            yield

    def _holds_something(self) -> bool:
        if not self.path.is_dir():
            return self.path.exists()
        return any(path.name not in _BEGUN for path in self.path.iterdir())

    def target(self, name: str) -> Target:
        """The place of one model."""
        return Target(self.path / name)


def _read(path: Path) -> dict[str, Any]:
    """A JSON file; empty if it is missing or was damaged, so that its step is done again."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _write(path: Path, record: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(record, indent=2, allow_nan=False) + "\n")
