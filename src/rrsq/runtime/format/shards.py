"""The safetensors files of a model folder, found without trusting what the folder says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from .config_file import is_plain_name
from .json_file import INDEX_LIMIT, read_json_object
from .validate import merge_headers

__all__ = ["SINGLE_SHARD", "check_layers", "has_shards", "read_shards", "shard_files"]

SINGLE_SHARD = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def has_shards(folder: Path) -> bool:
    """Whether a model is stored as safetensors there."""
    return (folder / SINGLE_SHARD).is_file() or (folder / _INDEX).exists()


def shard_files(folder: Path) -> list[Path]:
    """The files that transformers loads a model from: ``model.safetensors``, else those of the index.

    Raises:
        CheckpointError: there are none, the index is damaged, or it names a file outside the folder.
    """
    if (folder / SINGLE_SHARD).is_file():
        return [folder / SINGLE_SHARD]
    if not (folder / _INDEX).exists():
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        hint = "It may not have been copied."
        if pickles:
            hint = (
                f"There is {pickles[0]}, but a pickle may run code. If you trust it, convert it: load it with"
                " from_pretrained of transformers, and save it with save_pretrained."
            )
        raise CheckpointError(f"'{folder}' holds no {SINGLE_SHARD}. {hint}")
    return [folder / name for name in sorted(set(_weight_map(folder).values()))]


def read_shards(folder: Path) -> dict[str, dict[str, Any]]:
    """The header entries of all tensors of a folder, by name, as :func:`merge_headers` gives them.

    Raises:
        CheckpointError: as in :func:`shard_files`; a shard is missing or damaged; or the index and the shards
            contradict each other.
    """
    files = shard_files(folder)
    tensors = merge_headers(files)
    if files == [folder / SINGLE_SHARD]:
        return tensors
    index = _weight_map(folder)
    for name in sorted(index.keys() | tensors.keys()):
        shard = Path(tensors[name]["file"]).name if name in tensors else "no shard"
        if index.get(name) != shard:
            raise CheckpointError(
                f"{folder / _INDEX} is damaged: it places the tensor '{name:.200}' in"
                f" {index.get(name, 'no shard')}, and it is in {shard}."
            )
    return tensors


def check_layers(folder: Path, layers: int) -> None:
    """Refuse a folder that cannot hold the layers its configuration asks for, before any is built.

    Raises:
        CheckpointError: there are fewer tensors than layers, or as in :func:`read_shards`.
    """
    tensors = len(read_shards(folder))
    if layers > tensors:
        raise CheckpointError(
            f"The config.json of '{folder}' asks for {layers} layers, and the folder holds {tensors} tensors"
            " in all. A shard may not have been copied."
        )


def _weight_map(folder: Path) -> dict[str, str]:
    path = folder / _INDEX
    index = read_json_object(path, INDEX_LIMIT)
    entries = index.get("weight_map")
    if not isinstance(entries, dict) or not entries or not isinstance(index.get("metadata", {}), dict):
        raise CheckpointError(f"{path} is damaged: it has no valid 'weight_map' and 'metadata'.")
    for name in entries.values():
        if not is_plain_name(name):
            raise CheckpointError(
                f"{path} names {name!r:.200}, which is no safetensors file of the folder itself."
            )
    return entries
