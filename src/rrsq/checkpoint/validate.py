"""Checking a checkpoint's tensors against the model they are for, before any is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError

__all__ = ["check_shards", "read_header"]

_MAX_HEADER = 100 * 2**20
_FLOATS = {"F64", "F32", "F16", "BF16"}
_DTYPES = {torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL"}


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file: dtype, shape and offsets of each tensor.

    Raises:
        CheckpointError: there is no such file, it is no safetensors file, or it is shorter or longer than its
            header says.
    """
    if not path.is_file():
        raise CheckpointError(f"The checkpoint lacks the file '{path}'. It may not have been copied.")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise CheckpointError(f"{path} is damaged: it is no safetensors file, or its header is cut off.")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged: its header is not valid JSON.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is damaged: its header is not a mapping.")
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    try:
        end = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: a tensor has no valid offsets.") from error
    if 8 + length + end != size:
        raise CheckpointError(
            f"{path} is damaged: {size} bytes where its header describes {8 + length + end}. Copy it again."
        )
    return tensors


def check_shards(model: torch.nn.Module, files: Iterable[str]) -> None:
    """Compare what the shards hold with what a model expects.

    Args:
        model: assembled, its tensors may be on the meta device.
        files: paths of the safetensors shards; nothing is checked if there are none.

    Raises:
        CheckpointError: a tensor is missing, or has another shape or kind of dtype.
    """
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        found.update(read_header(Path(file)))
    if not found:
        return
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    expected = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    missing = sorted(expected.keys() - found.keys())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"The checkpoint lacks the tensor '{missing[0]}'{more}. A shard may not have been copied."
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
