"""Reading the JSON files of a model folder, which may hold anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...errors import CheckpointError

__all__ = ["CONFIG_LIMIT", "INDEX_LIMIT", "json_object", "read_json_object"]

# Bytes. Parsed JSON takes up to some thirty times its size in memory. Real configurations have a few KB, the
# index of a mixture with tens of thousands of experts some ten MB.
CONFIG_LIMIT = 4 * 2**20
INDEX_LIMIT = 32 * 2**20


def read_json_object(path: Path, limit: int = CONFIG_LIMIT) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        path: the file.
        limit: bytes that it may have.

    Raises:
        CheckpointError: it is no file, cannot be read, is larger, or holds anything else.
    """
    if not path.is_file():
        raise CheckpointError(f"'{path}' is missing or is no file. It may not have been copied.")
    try:
        size = path.stat().st_size
        if size > limit:
            raise CheckpointError(
                f"{path} has {size / 1e6:.0f} MB; no such file needs more than {limit / 1e6:.0f}."
                " It is damaged or belongs to something else."
            )
        return json_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {_reason(error)}.") from error


def json_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object of which no key appears twice.

    Raises:
        ValueError: the data are something else; the message says what, in half a sentence.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_without_repetition)
    except UnicodeDecodeError as error:
        raise ValueError("it is not valid UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not valid JSON ({error})") from error
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("its JSON is no object")
    return value


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"it gives '{key[:100]}' twice")
        found[key] = value
    return found


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).rstrip(".")
