"""Tile sizes for the products of a mixture of experts. All need less than 100 KiB of shared memory."""

from __future__ import annotations

from .plans import FusedPlan, GemvPlan

__all__ = ["float_plan", "integer_plan"]

_GEMV = GemvPlan(chunks=32, warps=2)
# Tiles that keep every multiprocessor of a large GPU busy while another one's loads are on their way.
_ENOUGH_TILES = 512
_BLOCK_OUT = 64
_LEAST_ROWS = 16  # Of a tile on the tensor cores.


def integer_plan(block_rows: int, likely: int, out_features: int, row_bytes: int) -> GemvPlan | FusedPlan:
    """The plan for sums of integers, in blocks of ``block_rows`` rows.

    ``likely`` of the blocks will be needed, or more. K is split where the output alone has too few tiles.
    """
    if block_rows == 1:
        return _GEMV
    if block_rows == 128:
        return FusedPlan(128, 128, 64, 1, 4, 3)
    split = _split(likely, out_features, row_bytes)
    return FusedPlan(block_rows, _BLOCK_OUT, 128, split, 4, 4 if block_rows == 16 else 3)


def float_plan(
    block_rows: int, likely: int, out_features: int, row_bytes: int, group_size: int | None
) -> FusedPlan:
    """The plan for sums of floats; see :func:`integer_plan`.

    A step is one group of ``group_size`` channels with real scales; None: 16-bit activations. A row that is a
    block of its own takes a tile whose other rows are absent.
    """
    rows = max(block_rows, _LEAST_ROWS)
    split = _split(likely, out_features, row_bytes) if rows < 128 else 1
    if group_size is None:
        return FusedPlan(
            rows, _BLOCK_OUT, 128 if rows == _LEAST_ROWS else 64, split, 4, 3 if rows < 128 else 2
        )
    return FusedPlan(rows, 128 if rows == 64 else _BLOCK_OUT, group_size // 2, split, 4, 3)


def _split(likely: int, out_features: int, row_bytes: int) -> int:
    split = 1
    while likely * -(-out_features // _BLOCK_OUT) * split < _ENOUGH_TILES and 512 * split <= row_bytes:
        split *= 2
    return split
