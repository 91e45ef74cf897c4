"""Checking a checkpoint's tensors against the model they are for, before any is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ...errors import CheckpointError
from .json_file import json_object

__all__ = ["check_shards", "merge_headers", "read_header"]

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
_FLOATS = {"F64", "F32", "F16", "BF16"}
_DTYPES = {torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL"}


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file: ``dtype``, ``shape`` and ``data_offsets`` of each tensor.

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
        end = _check_entries(header)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}. Copy it again.") from error
    if 8 + length + end != size:
        raise CheckpointError(
            f"{path} is damaged: {size} bytes where its header describes {8 + length + end}. Copy it again."
        )
    return header


def merge_headers(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """The headers of several shards as one; each entry also names its ``file``.

    Raises:
        CheckpointError: as in :func:`read_header`, or two shards hold the same tensor.
    """
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in found:
                other = Path(found[name]["file"]).name
                raise CheckpointError(f"{file} holds the tensor '{name:.200}' that is in {other} as well.")
            found[name] = {**entry, "file": str(file)}
    return found


def _check_entries(header: dict[str, Any]) -> int:
    """The bytes behind a header that its tensors take. Raises ValueError with what is wrong."""
    ranges: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        where = f"tensor '{name:.200}'"
        if not isinstance(entry, dict):
            raise ValueError(f"{where} has no description")
        offsets, shape, dtype = (
            _sizes(entry.get("data_offsets")),
            _sizes(entry.get("shape")),
            entry.get("dtype"),
        )
        if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise ValueError(f"{where} has no valid offsets")
        if shape is None or len(shape) > _MAX_DIMENSIONS:
            raise ValueError(f"{where} has no valid shape")
        if not isinstance(dtype, str) or dtype not in _BITS:
            raise ValueError(f"{where} has the unknown dtype {dtype!r:.50}")
        if math.prod(shape) * _BITS[dtype] != 8 * (offsets[1] - offsets[0]):
            raise ValueError(
                f"{where} takes {offsets[1] - offsets[0]} bytes, which is not what its shape and dtype need"
            )
        ranges.append((offsets[0], offsets[1], where))
    end = 0
    for start, stop, where in sorted(ranges):
        if start != end:
            raise ValueError(f"{where} overlaps another one, or there is a gap before it")
        end = stop
    return end


def _sizes(value: Any) -> list[int] | None:
    """The value if it is a list of integers in 0..2**63 - 1, else None."""
    valid = isinstance(value, list) and all(type(entry) is int and 0 <= entry < 2**63 for entry in value)
    return value if valid else None


def check_shards(model: torch.nn.Module, files: Iterable[str]) -> None:
    """Compare what the shards hold with what a model expects.

    Args:
        model: assembled, its tensors may be on the meta device.
        files: paths of the safetensors shards; nothing is checked if there are none.

    Raises:
        CheckpointError: a shard is damaged or no safetensors file, or a tensor is missing, unknown to the
            model, or of another shape or kind of dtype.
    """
    paths = [Path(file) for file in files]
    if not paths:
        return
    for path in paths:
        if path.suffix != ".safetensors":
            raise CheckpointError(f"'{path}' is no safetensors file; pickled weights are never loaded.")
    found = merge_headers(paths)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    expected = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    missing = sorted(expected.keys() - found.keys())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"The checkpoint lacks the tensor '{missing[0]}'{more}. A shard may not have been copied."
        )
    unknown = sorted(found.keys() - expected.keys() - set(tied))
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise CheckpointError(
            f"The checkpoint holds the tensor '{unknown[0]:.200}'{more}, for which its config.json and recipe"
            " have no use: they belong to another checkpoint, or were changed."
        )
    for name, tensor in expected.items():
        shape, dtype = found[name].get("shape"), found[name].get("dtype")
        if shape != list(tensor.shape):
            raise CheckpointError(
                f"Tensor '{name}' of the checkpoint has shape {shape}; its recipe needs {list(tensor.shape)}."
            )
        fits = dtype in _FLOATS if tensor.is_floating_point() else dtype == _DTYPES.get(tensor.dtype)
        if not fits:
            raise CheckpointError(f"Tensor '{name}' of the checkpoint has dtype {dtype}, not {tensor.dtype}.")
