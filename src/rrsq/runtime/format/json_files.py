"""Reading the JSON files of a model folder, which may hold anything.

A few digits of ``config.json`` decide how much memory a model takes, and a name in it which code is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ...errors import CheckpointError

__all__ = [
    "INDEX_LIMIT",
    "check_sizes",
    "is_plain_name",
    "json_object",
    "numbers",
    "read_config",
    "read_json_object",
]

# Bytes. Parsed JSON takes up to some thirty times its size in memory. Real configurations have a few KB, the
# index of a mixture with tens of thousands of experts some ten MB.
CONFIG_LIMIT = 4 * 2**20
INDEX_LIMIT = 32 * 2**20
# The first pattern that matches a field limits it. Every product of sizes that makes a tensor stays below
# 2**63, and every list that transformers makes of a size stays small.
_LIMITS = (
    ("num_hidden_layers", 2**12),
    ("num_layers", 2**12),
    ("*_layers", 2**12),
    ("num_*", 2**16),
    ("*_heads", 2**16),
    ("vocab_size", 2**24),
    ("*_size", 2**22),
    ("*_dim", 2**22),
)
_IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation")


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


def read_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a local model folder, if it asks for nothing absurd.

    Raises:
        CheckpointError: it cannot be read, a size is out of all proportion, or it names code or weights that
            are not in the folder.
    """
    path = folder / "config.json"
    config = read_json_object(path)
    check_sizes(config, path)
    if not isinstance(config.get("quantization_config", {}), (dict, type(None))):
        raise CheckpointError(f"{path} is damaged: its quantization_config is no object.")
    for name in _IMPLEMENTATIONS:
        if any("/" in value for value in _strings(config.get(name))):
            raise CheckpointError(
                f"{path} asks for code from the Hub ('{name}': {config[name]!r:.200}). Remove the field, or"
                " pass it to from_pretrained yourself if you trust that code."
            )
    weights = config.get("transformers_weights")
    if weights is not None and not is_plain_name(weights):
        raise CheckpointError(
            f"{path} names weights that are no safetensors file of the folder itself: {weights!r:.200}."
        )
    return config


def check_sizes(config: Mapping[str, Any], where: Any) -> None:
    """Refuse a configuration that asks for a size which no model has.

    Raises:
        CheckpointError: it does; ``where`` is what the message calls it.
    """
    for key, value in numbers(config):
        limit = next((limit for pattern, limit in _LIMITS if fnmatchcase(key, pattern)), None)
        if limit is not None and value > limit:
            raise CheckpointError(
                f"{where} asks for '{key}' of {_short(value)}; no model has more than {limit}."
            )


def numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a configuration and of the sections in it, with the names of their fields."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from numbers(value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield str(key), value


def _strings(value: Any) -> list[str]:
    values = value.values() if isinstance(value, Mapping) else [value]
    return [entry for entry in values if isinstance(entry, str)]


def _short(value: float) -> str:
    return str(value) if abs(value) < 1e15 else f"{float(min(value, 10**300)):.0e}"


def is_plain_name(name: Any) -> bool:
    """Whether a value names a safetensors file of a folder, and is no path, on any system."""
    if not isinstance(name, str) or not name.endswith(".safetensors"):
        return False
    if len(name) > 200 or not name.isprintable():
        return False
    return PurePosixPath(name).name == PureWindowsPath(name).name == name
