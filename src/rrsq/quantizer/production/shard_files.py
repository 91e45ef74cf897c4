"""Filling the shards of a checkpoint, some tensors at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .layout import ShardLayout

__all__ = ["ShardFiles", "raw_bytes", "sync_folder"]


class ShardFiles:
    """The shards of a layout in a folder.

    Args:
        folder: where they are.
        layout: which tensors go where.
    """

    def __init__(self, folder: Path, layout: ShardLayout) -> None:
        self.folder = folder
        self.layout = layout

    def create(self) -> None:
        """Make all files in their full size, so that a full disk is found here and not hours later."""
        for name, header in self.layout.headers.items():
            with (self.folder / name).open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, self.layout.sizes[name])
                file.write(header)
                file.flush()
                os.fsync(file.fileno())
        sync_folder(self.folder)

    def write(self, tensors: Mapping[str, Tensor]) -> str:
        """Put tensors where they belong, and have them on the disk.

        Returns:
            :meth:`digest` of them.

        Raises:
            ValueError: a tensor is not what the layout says.
        """
        for file in sorted({self.layout.places[name].file for name in tensors}):
            with (self.folder / file).open("rb+") as handle:
                for name, tensor in tensors.items():
                    place = self.layout.places[name]
                    if place.file != file:
                        continue
                    if (tensor.dtype, tuple(tensor.shape)) != (place.dtype, place.shape):
                        raise ValueError(
                            f"'{name}' is {tensor.dtype} {tuple(tensor.shape)},"
                            f" not {place.dtype} {place.shape}"
                        )
                    handle.seek(place.offset)
                    handle.write(raw_bytes(tensor))
                handle.flush()
                os.fsync(handle.fileno())
        return _digest((name, raw_bytes(tensor)) for name, tensor in tensors.items())

    def digest(self, names: Iterable[str]) -> str:
        """SHA-256 (hex) of some tensors as they are on the disk, in the order of their names."""
        return _digest((name, raw_bytes(self.read(name))) for name in names)

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        place = self.layout.places[name]
        tensor = torch.empty(place.shape, dtype=place.dtype)
        with (self.folder / place.file).open("rb") as file:
            file.seek(place.offset)
            file.readinto(raw_bytes(tensor))
        return tensor

    def under(self, path: str) -> list[str]:
        """Names of the tensors of a module."""
        return [name for name in self.layout.places if name.startswith(f"{path}.")]


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU; those of a contiguous one can be written to."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


def sync_folder(folder: Path) -> None:
    """Have a folder's entries on the disk: files made in it, and renames."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(tensors: Iterable[tuple[str, memoryview]]) -> str:
    found = hashlib.sha256()
    for _, data in sorted(tensors, key=lambda entry: entry[0]):
        found.update(data)
    return found.hexdigest()
