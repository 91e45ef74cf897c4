"""How much of a checkpoint is what, from the headers of its shards."""

from __future__ import annotations

import math
from pathlib import Path

from ..errors import CheckpointError
from .validate import read_header

__all__ = ["checkpoint_contents"]

_QUANTIZED = ("weight_packed", "weight_scale", "weight_multiplier")


def checkpoint_contents(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Sum the tensors of a checkpoint by kind.

    Args:
        folder: with safetensors shards.

    Returns:
        By kind (``INT4 linears``, ``embedding and head``, ``other``): tensors, bytes, and weights they stand
        for.

    Raises:
        CheckpointError: there is no shard, or one is damaged.
    """
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise CheckpointError(f"'{folder}' holds no safetensors file.")
    found: dict[str, tuple[int, int, int]] = {}
    for shard in shards:
        for name, entry in read_header(shard).items():
            kind = _kind(name)
            first, last = entry["data_offsets"]
            weights = math.prod(entry["shape"])
            if kind == "INT4 linears":
                weights = 2 * weights if name.endswith("weight_packed") else 0
            count, size, total = found.get(kind, (0, 0, 0))
            found[kind] = count + 1, size + last - first, total + weights
    return dict(sorted(found.items()))


def _kind(name: str) -> str:
    leaf = name.rsplit(".", 1)[-1]
    if leaf in _QUANTIZED:
        return "INT4 linears"
    if "embed" in name or "lm_head" in name:
        return "embedding and head"
    return "other"
