"""The safetensors shards of the output: where each tensor will lie, and filling them.

Sizes follow from the recipe, so the files can be made in full at the start (a disk that is too small is found
then) and filled in any order, one decoder layer after the other.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import UsageError
from ...models import family_for
from ...recipe import Recipe
from ...runtime.format.format import CheckpointInfo, RotationInfo
from ...runtime.format.integration import assemble_model
from ...runtime.format.shards import DTYPES, SINGLE_SHARD, TensorPlace, raw_bytes
from ...runtime.rotation.rotations import make_rotations
from ...runtime.scheme import keeps_tie
from ...storage import allocate, sync_folder
from .source import empty_model

__all__ = ["OutputShards", "parse_size", "planned_tensors"]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def parse_size(text: str) -> int:
    """Bytes of a size such as ``5GB`` or ``300 MB`` (decimal units).

    Raises:
        UsageError: it is no size above zero.
    """
    size_and_unit = r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]*)\s*"
    match = re.fullmatch(size_and_unit, text) if isinstance(text, str) else None
    size = int(float(match[1]) * _UNITS.get(match[2].upper(), 0)) if match else 0
    if size <= 0:
        raise UsageError(
            f"--max-shard-size '{text}' is no size. Give a number and a unit, such as 5GB or 300MB."
        )
    return size


def planned_tensors(config: Any, dtype: torch.dtype, recipe: Recipe) -> dict[str, Tensor]:
    """The tensors that a quantized model will have, by name, on the meta device."""
    family = family_for(config)
    rotations = make_rotations(
        recipe.rotation, family.sizes(config), seed=0, folds_residual=family.folds_residual
    )
    config = copy.deepcopy(config)
    if not keeps_tie(recipe, family, folds_residual=rotations.residual is not None):
        config.tie_word_embeddings = False
    model = empty_model(config, dtype)
    described = RotationInfo.model_validate(rotations.describe())
    with torch.device("meta"):
        assemble_model(model, CheckpointInfo(recipe=recipe, rotation=described))
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


class OutputShards:
    """All shards of a checkpoint, planned before any tensor is known.

    Args:
        folder: where they are, or will be.
        tensors: in the order of the model; only dtypes and shapes are looked at.
        max_shard_size: bytes of tensors that a file holds at most, where one tensor is not larger by itself.

    Attributes:
        places: of each tensor, by name.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor], max_shard_size: int) -> None:
        self.folder = folder
        self.places: dict[str, TensorPlace] = {}
        self._headers: dict[Path, bytes] = {}
        self._sizes: dict[Path, int] = {}
        shards: list[list[str]] = [[]]
        filled = 0
        for name, tensor in tensors.items():
            if shards[-1] and filled + tensor.nbytes > max_shard_size:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += tensor.nbytes
        for number, names in enumerate(shards, start=1):
            file = SINGLE_SHARD
            if len(shards) > 1:
                file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._plan_file(folder / file, {name: tensors[name] for name in names})

    def _plan_file(self, file: Path, tensors: dict[str, Tensor]) -> None:
        # Wide dtypes come first, so that every tensor is aligned; this is safetensors' own order too.
        ordered = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        starts: dict[str, int] = {}
        end = 0
        for name in ordered:
            tensor = tensors[name]
            starts[name], end = end, end + tensor.nbytes
            header[name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [starts[name], end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._headers[file] = len(text).to_bytes(8, "little") + text
        first = len(self._headers[file])
        self._sizes[file] = first + end
        for name in ordered:
            tensor = tensors[name]
            self.places[name] = TensorPlace(
                file, first + starts[name], tensor.nbytes, _NAMES[tensor.dtype], tuple(tensor.shape)
            )

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(place.size for place in self.places.values())

    @property
    def file_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self._sizes.values())

    def index(self) -> dict[str, object] | None:
        """``model.safetensors.index.json``; None where there is one shard."""
        if len(self._sizes) == 1:
            return None
        return {
            "metadata": {"total_size": self.tensor_bytes},
            "weight_map": {name: place.file.name for name, place in self.places.items()},
        }

    def create(self) -> None:
        """Make all files in their full size, so that a full disk is found here and not hours later."""
        for path, header in self._headers.items():
            with path.open("wb") as file:
                allocate(file, self._sizes[path])
                file.write(header)
                file.flush()
                os.fsync(file.fileno())
        sync_folder(self.folder)

    def write(self, tensors: Mapping[str, Tensor]) -> str:
        """Put tensors where they belong; :meth:`sync` has them on the disk.

        Returns:
            :meth:`digest` of them.

        Raises:
            ValueError: a tensor is not what was planned.
        """
        for path in sorted(self.files(tensors)):
            with path.open("rb+") as file:
                for name, tensor in tensors.items():
                    place = self.places[name]
                    if place.file != path:
                        continue
                    if (_NAMES[tensor.dtype], tuple(tensor.shape)) != (place.dtype, place.shape):
                        raise ValueError(
                            f"'{name}' is {tensor.dtype} {tuple(tensor.shape)},"
                            f" not {DTYPES[place.dtype]} {place.shape}"
                        )
                    file.seek(place.offset)
                    file.write(raw_bytes(tensor))
        return _digest((name, raw_bytes(tensor)) for name, tensor in tensors.items())

    def files(self, names: Iterable[str]) -> set[Path]:
        """The files that some tensors are in."""
        return {self.places[name].file for name in names}

    def sync(self, files: Iterable[Path]) -> None:
        """Have what was written to some files on the disk."""
        for path in files:
            with path.open("rb+") as file:
                os.fsync(file.fileno())

    def digest(self, names: Iterable[str]) -> str:
        """SHA-256 (hex) of some tensors as they are on the disk, in the order of their names."""
        return _digest((name, raw_bytes(self.places[name].read())) for name in names)

    def under(self, path: str) -> list[str]:
        """Names of the tensors of a module."""
        return [name for name in self.places if name.startswith(f"{path}.")]


def _digest(tensors: Iterable[tuple[str, memoryview]]) -> str:
    found = hashlib.sha256()
    for _, data in sorted(tensors, key=lambda entry: entry[0]):
        found.update(data)
    return found.hexdigest()
