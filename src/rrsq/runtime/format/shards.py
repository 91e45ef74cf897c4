"""The safetensors files of a model folder, read without trusting what they or the folder say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from .json_files import INDEX_LIMIT, is_plain_name, json_object, read_json_object

__all__ = [
    "DTYPES",
    "SINGLE_SHARD",
    "TensorPlace",
    "has_shards",
    "merge_headers",
    "raw_bytes",
    "read_header",
    "read_shards",
    "shard_files",
]

SINGLE_SHARD = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# Of the file itself; the format allows 100 MB. Parsed, a header takes up to some thirty times its size.
_MAX_HEADER = 32 * 2**20
_MAX_DIMENSIONS = 16
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
# Those that torch has and models are made of.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorPlace:
    """A tensor in a safetensors file.

    Attributes:
        file: its path.
        offset: the tensor's first byte, counted from the file's start.
        size: bytes.
        dtype: as safetensors names it; :data:`DTYPES` has torch's.
        shape: of the tensor.
    """

    file: Path
    offset: int
    size: int
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """The tensor, on the CPU; of a dtype in :data:`DTYPES`."""
        tensor = torch.empty(self.shape, dtype=DTYPES[self.dtype])
        with self.file.open("rb") as file:
            file.seek(self.offset)
            file.readinto(raw_bytes(tensor))
        return tensor


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU; those of a contiguous one can be written to."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


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


def read_shards(folder: Path) -> dict[str, TensorPlace]:
    """The tensors of a folder, by name.

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
        shard = tensors[name].file.name if name in tensors else "no shard"
        if index.get(name) != shard:
            raise CheckpointError(
                f"{folder / _INDEX} is damaged: it places the tensor '{name:.200}' in"
                f" {index.get(name, 'no shard')}, and it is in {shard}."
            )
    return tensors


def read_header(path: Path) -> dict[str, TensorPlace]:
    """The tensors of a safetensors file, by name.

    Raises:
        CheckpointError: there is no such file, it is no safetensors file, it is shorter or longer than its
            header says, or tensors overlap, leave gaps, or have other sizes than their shapes and dtypes.
    """
    if not path.is_file():
        raise CheckpointError(f"The checkpoint lacks the file '{path}'. It may not have been copied.")
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER, size - 8):
                raise ValueError("it is no safetensors file, or its header is cut off")
            header = json_object(file.read(length))
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its metadata are no mapping to texts")
        places = {name: _place(path, 8 + length, name, entry) for name, entry in header.items()}
        end = _end(places, 8 + length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}. Copy it again.") from error
    if end != size:
        raise CheckpointError(
            f"{path} is damaged: {size} bytes where its header describes {end}. Copy it again."
        )
    return places


def merge_headers(files: Iterable[Path]) -> dict[str, TensorPlace]:
    """The tensors of several shards, by name.

    Raises:
        CheckpointError: as in :func:`read_header`, or two shards hold the same tensor.
    """
    found: dict[str, TensorPlace] = {}
    for file in files:
        for name, place in read_header(file).items():
            if name in found:
                other = found[name].file.name
                raise CheckpointError(f"{file} holds the tensor '{name:.200}' that is in {other} as well.")
            found[name] = place
    return found


def _place(path: Path, start: int, name: str, entry: Any) -> TensorPlace:
    """An entry of a header; tensors begin at ``start``. Raises ValueError with what is wrong."""
    where = f"tensor '{name:.200}'"
    if not isinstance(entry, dict):
        raise ValueError(f"{where} has no description")
    offsets, shape, dtype = _sizes(entry.get("data_offsets")), _sizes(entry.get("shape")), entry.get("dtype")
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{where} has no valid offsets")
    if shape is None or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"{where} has no valid shape")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{where} has the unknown dtype {dtype!r:.50}")
    size = offsets[1] - offsets[0]
    if math.prod(shape) * _BITS[dtype] != 8 * size:
        raise ValueError(f"{where} takes {size} bytes, which is not what its shape and dtype need")
    return TensorPlace(path, start + offsets[0], size, dtype, tuple(shape))


def _end(places: Mapping[str, TensorPlace], start: int) -> int:
    """Where a file's last tensor ends. Raises ValueError unless each begins where another ends."""
    end = start
    for offset, stop, name in sorted((p.offset, p.offset + p.size, name) for name, p in places.items()):
        if offset != end:
            raise ValueError(f"tensor '{name:.200}' overlaps another one, or there is a gap before it")
        end = stop
    return end


def _sizes(value: Any) -> list[int] | None:
    """The value if it is a list of integers in 0..2**63 - 1, else None."""
    valid = isinstance(value, list) and all(type(entry) is int and 0 <= entry < 2**63 for entry in value)
    return value if valid else None


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
