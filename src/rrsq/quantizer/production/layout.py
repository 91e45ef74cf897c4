"""Where each tensor of a checkpoint will lie in its safetensors shards, before any of them is known.

Sizes follow from the recipe, so the files can be made in full at the start (a disk that is too small is found
then) and filled in any order, one decoder layer after the other.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...errors import UsageError

__all__ = ["DTYPE_NAMES", "ShardLayout", "TensorPlace", "parse_size", "plan_shards"]

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class TensorPlace:
    """A tensor in a file: its first byte, counted from the file's start, and what it is."""

    file: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ShardLayout:
    """All shards of a checkpoint.

    Attributes:
        places: of each tensor, by name.
        headers: of each file by name: the bytes in front of the tensors.
        sizes: of each file by name, in bytes.
    """

    places: dict[str, TensorPlace] = field(default_factory=dict)
    headers: dict[str, bytes] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(place.size for place in self.places.values())

    @property
    def file_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.sizes.values())

    def index(self) -> dict[str, object] | None:
        """``model.safetensors.index.json``; None where there is one shard."""
        if len(self.sizes) == 1:
            return None
        return {
            "metadata": {"total_size": self.tensor_bytes},
            "weight_map": {name: place.file for name, place in self.places.items()},
        }


def parse_size(text: str) -> int:
    """Bytes of a size such as ``5GB`` or ``300 MB`` (decimal units).

    Raises:
        UsageError: it is no size above zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    size = int(float(match[1]) * _UNITS.get(match[2].upper(), 0)) if match else 0
    if size <= 0:
        raise UsageError(f"'{text}' is no size of a shard. Give a number and a unit, such as 5GB or 300MB.")
    return size


def plan_shards(tensors: Mapping[str, Tensor], max_shard_size: int) -> ShardLayout:
    """Give each tensor its place.

    Args:
        tensors: in the order of the model; only dtypes and shapes are looked at.
        max_shard_size: bytes of tensors that a file holds at most, where one tensor is not larger by itself.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    layout = ShardLayout()
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _plan_file(layout, file, {name: tensors[name] for name in names})
    return layout


def _plan_file(layout: ShardLayout, file: str, tensors: dict[str, Tensor]) -> None:
    # Wide dtypes come first, so that every tensor is aligned; this is safetensors' own order too.
    ordered = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in ordered:
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    layout.headers[file] = len(text).to_bytes(8, "little") + text
    layout.sizes[file] = len(layout.headers[file]) + end
    for name in ordered:
        tensor = tensors[name]
        start = header[name]["data_offsets"][0]  # type: ignore[index]
        layout.places[name] = TensorPlace(
            file, len(layout.headers[file]) + start, tensor.dtype, tuple(tensor.shape)
        )
