"""Telling whether two models are the same, by their names and the bytes of their files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

__all__ = ["digest", "model_fingerprint", "model_identity"]

# What decides how a model computes or tokenizes. A model card or a picture does not.
SUFFIXES = (".json", ".safetensors", ".bin", ".gguf", ".model", ".txt", ".jinja", ".py")
CHUNK = 1 << 24


def digest(data: Any) -> str:
    """SHA-256 (hex) of JSON-able data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def model_identity(model: str, data_root: Path | None = None) -> str:
    """A model's absolute path, or its id on the Hub: one name, however it was written.

    Raises:
        ModelLoadError: there is no such folder or file.
    """
    from rrsq.runtime.format.loading import locate_model

    location, options = locate_model(model, data_root)
    path = Path(location, options.get("gguf_file", ""))
    return str(path.resolve()) if path.exists() else location


def model_fingerprint(model: str, data_root: Path | None = None) -> str:
    """SHA-256 (hex) of a model's files; of a model on the Hub, its id and commit.

    All bytes are read, at the speed of the disk.

    Raises:
        ModelLoadError: there is no such model.
    """
    from rrsq.runtime.format.loading import load_config, locate_model

    location, options = locate_model(model, data_root)
    folder = Path(location)
    if not folder.is_dir():
        config = load_config(model, data_root)
        return digest({"hub": location, "commit": getattr(config, "_commit_hash", None)})
    paths = [folder / options["gguf_file"]] if "gguf_file" in options else sorted(folder.iterdir())
    files = {path.name: _file_digest(path) for path in paths if path.suffix in SUFFIXES and path.is_file()}
    return digest(files)


def _file_digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            found.update(chunk)
    return found.hexdigest()
