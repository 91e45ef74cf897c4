"""How much of a checkpoint is what, from the headers of its shards."""

from __future__ import annotations

import math
from pathlib import Path

from .shards import read_shards

__all__ = ["checkpoint_contents"]

# Weights that an entry of the tensors of a quantized linear stands for.
_WEIGHTS_PER_ENTRY = {"weight_packed": 2, "weight_scale": 0, "weight_multiplier": 0}


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
    found: dict[str, tuple[int, int, int]] = {}
    for name, entry in read_shards(folder).items():
        kind = _kind(name)
        first, last = entry["data_offsets"]
        weights = math.prod(entry["shape"]) * _WEIGHTS_PER_ENTRY.get(_leaf(name), 1)
        count, size, total = found.get(kind, (0, 0, 0))
        found[kind] = count + 1, size + last - first, total + weights
    return dict(sorted(found.items()))


def _kind(name: str) -> str:
    if "embed" in name or "lm_head" in name:
        return "embedding and head"
    return "INT4 linears" if _leaf(name) in _WEIGHTS_PER_ENTRY else "other"


def _leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]
