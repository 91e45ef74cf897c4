"""Sorting rows by the expert that multiplies them, on the device: no count ever reaches the host.

A grouped product takes its rows in blocks that belong to one expert each. How many blocks an expert needs
depends on the data; how many there can be at most does not. So the table of blocks has that fixed length, and
what is not needed is marked. Few operations make it: at decode each of them counts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Routing", "route_rows"]

_BLOCK_SIZES = (16, 32, 64, 128)


class Routing(NamedTuple):
    """Which expert multiplies which row, and the rows in blocks.

    Block ``b`` of expert ``e`` holds the rows ``order[start[e] + i * block_rows:][:block_rows]``, no further
    than ``start[e + 1]``, where ``i`` is ``b`` less the blocks of the experts before ``e``.

    Attributes:
        experts: int ``[rows]``, each in ``0..num_experts - 1``.
        order: int64 ``[rows]``, the rows sorted by expert.
        start: int64 ``[num_experts + 1]``, the number of rows of the experts before each.
        ends: int64 ``[num_experts]``, the number of blocks of the experts up to each.
        blocks: int64 ``[blocks]``, the expert of each block; ``num_experts`` for one that is not needed.
        block_rows: rows of a block at most. With 1 each row is its own block, and the tensors behind
            ``experts`` are empty.
    """

    experts: Tensor
    order: Tensor
    start: Tensor
    ends: Tensor
    blocks: Tensor
    block_rows: int


def route_rows(experts: Tensor, num_experts: int, block_rows: int | None = None) -> Routing:
    """Sort rows by expert and cut them into blocks.

    Args:
        experts: int ``[rows]``, the expert of each row, each in ``0..num_experts - 1``.
        num_experts: how many there are.
        block_rows: rows of a block, 1 for no sorting; None chooses by the number of rows.
    """
    rows = experts.shape[0]
    if block_rows is None:
        block_rows = _block_rows(rows, num_experts)
    if block_rows == 1:
        empty = torch.empty(0, dtype=torch.int64, device=experts.device)
        return Routing(experts, empty, empty, empty, empty, 1)
    ordered, order = torch.sort(experts, stable=True)
    edges = torch.arange(num_experts + 1, dtype=ordered.dtype, device=experts.device)
    start = torch.searchsorted(ordered, edges)
    ends = ((start.diff() + (block_rows - 1)) // block_rows).cumsum(0)
    most = (rows + min(num_experts, rows) * (block_rows - 1)) // block_rows
    block = torch.arange(most, device=experts.device)
    return Routing(experts, order, start, ends, torch.searchsorted(ends, block, right=True), block_rows)


def _block_rows(rows: int, num_experts: int) -> int:
    """The least block that the mean number of rows of an expert fits into.

    Few rows seldom share an expert: up to a quarter of the experts' number each row is its own block.
    """
    if rows <= max(num_experts // 4, 1):
        return 1
    return next((size for size in _BLOCK_SIZES if rows <= size * num_experts), _BLOCK_SIZES[-1])
