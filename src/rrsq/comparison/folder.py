"""The folder of a comparison: finished steps and what they were made of.

::

    folder/comparison.json                  which model this folder is for
    folder/report.md, report.json           the result
    folder/full-precision/results.json      what each task gave
    folder/<recipe>/checkpoint/             an ordinary checkpoint
    folder/<recipe>/quantization.json       what it was made of, and how that went
    folder/<recipe>/results.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rrsq.errors import OutputExistsError, StorageError, UsageError
from rrsq.evaluation.report import jsonable, write_json

__all__ = ["FULL_PRECISION", "ComparisonFolder", "Target"]

FULL_PRECISION = "full-precision"
FORMAT = 1


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
        write_json(self.folder / name, jsonable(record))


class ComparisonFolder:
    """The folder itself.

    Args:
        path: of the folder; it may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, model: str) -> None:
        """Make the folder, or go on with it.

        Raises:
            OutputExistsError: it holds something else.
            UsageError: it holds a comparison of another model.
            StorageError: it cannot be written.
        """
        marker = self.path / "comparison.json"
        foreign = self.path.exists() and not marker.is_file()
        if foreign and not (self.path.is_dir() and not any(self.path.iterdir())):
            raise OutputExistsError(
                f"'{self.path}' exists and is no folder of 'rrsq compare'. Give another folder."
            )
        before = _read(marker).get("model")
        if before is not None and before != model:
            raise UsageError(
                f"'{self.path}' holds a comparison of the model '{before}'. Give another folder for"
                f" '{model}'."
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"'{self.path}' cannot be written: {error.strerror or error}.") from error
        write_json(marker, {"format": FORMAT, "model": model})

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
