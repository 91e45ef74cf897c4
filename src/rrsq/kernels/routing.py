"""Sorting rows by the expert that multiplies them, on the device: no count ever reaches the host.

A grouped product takes its rows in blocks that belong to one expert each. How many blocks an expert needs
depends on the data; how many there can be at most does not. So the table of blocks has that fixed length, and
what is not needed is marked.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Routing", "route_rows"]

_BLOCK_SIZES = (16, 32, 64, 128)


class Routing(NamedTuple):
    """Which expert multiplies which row.

    Attributes:
        experts: int ``[rows]``, each in ``0..num_experts - 1``.
        order: int64 ``[rows]``, the rows sorted by expert; empty where every row is a block of its own.
        blocks: int32 ``[3, blocks]``: of each block its expert, its first position in ``order`` and the one
            past its last. The expert of a block that is not needed is ``num_experts``. Empty with ``order``.
        block_rows: rows of a block at most.
    """

    experts: Tensor
    order: Tensor
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
        return Routing(experts, empty, empty.to(torch.int32).view(3, 0), 1)
    ordered, order = torch.sort(experts, stable=True)
    # start[e] is the number of rows of the experts before e.
    edges = torch.arange(num_experts + 1, dtype=ordered.dtype, device=experts.device)
    start = torch.searchsorted(ordered, edges)
    blocks_of = (start.diff() + (block_rows - 1)) // block_rows
    last_block = blocks_of.cumsum(0)
    most = (rows + min(num_experts, rows) * (block_rows - 1)) // block_rows
    block = torch.arange(most, device=experts.device)
    expert = torch.searchsorted(last_block, block, right=True)
    known = expert.clamp(max=num_experts - 1)
    first = start[known] + (block - (last_block - blocks_of)[known]) * block_rows
    last = torch.minimum(first + block_rows, start[known + 1])
    return Routing(experts, order, torch.stack((expert, first, last)).to(torch.int32), block_rows)


def _block_rows(rows: int, num_experts: int) -> int:
    """The least block that the mean number of rows of an expert fits into.

    Few rows seldom share an expert: up to a quarter of the experts' number each row is its own block.
    """
    if rows <= max(num_experts // 4, 1):
        return 1
    return next((size for size in _BLOCK_SIZES if rows <= size * num_experts), _BLOCK_SIZES[-1])
