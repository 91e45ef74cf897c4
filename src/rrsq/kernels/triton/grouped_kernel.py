"""The products of a mixture of experts: each row of the result has a weight of its own.

Rows are taken in blocks of one expert (:mod:`rrsq.kernels.routing`), with the arithmetic of
:mod:`.packed_gemm_kernel`; or, where there are few, one by one with that of :mod:`.gemv_kernel`. The experts
of a weight lie one after the other, so that row ``n`` of expert ``e`` is row ``e * out_features + n``.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import triton
import triton.language as tl

from .gemv_kernel import multiply_rows
from .packed_gemm_kernel import add_parts, multiply_packed

__all__ = ["grouped_gemm_kernel", "grouped_gemv_kernel", "rows_of_block"]


@triton.jit
def rows_of_block(expert, block, order_pointer, start_pointer, ends_pointer, BLOCK_ROWS: tl.constexpr):
    """Rows of a block of the table (:class:`rrsq.kernels.routing.Routing`) that is needed.

    Returns int64 ``[BLOCK_ROWS]``, the last row of the expert behind its end, and which of them are present.
    """
    before = tl.load(ends_pointer + expert - 1, mask=expert > 0, other=0)
    end = tl.load(start_pointer + expert + 1)
    position = tl.load(start_pointer + expert) + (block - before) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    return tl.load(order_pointer + tl.minimum(position, end - 1)), position < end


@triton.jit(do_not_specialize=["blocks", "num_experts"])
def grouped_gemm_kernel(
    operand_pointer,
    scale_pointer,
    order_pointer,
    start_pointer,
    ends_pointer,
    blocks_pointer,
    packed_pointer,
    multiplier_pointer,
    weight_scale_pointer,
    out_pointer,
    partial_pointer,
    counter_pointer,
    blocks,
    num_experts,
    out_features,
    in_features,
    ROWS_PER_TOKEN: tl.constexpr,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
    PTX: tl.constexpr,
):
    """One tile ``[BLOCK_OUT, BLOCK_ROWS]`` of Y^T of one block, or one of its ``SPLIT`` parts.

    The table of blocks is that of :class:`rrsq.kernels.routing.Routing`, all of it int64. Row ``r`` of the
    result reads the token ``r // ROWS_PER_TOKEN``.
    """
    block = tl.program_id(0)
    tile_out = tl.program_id(1)
    part = tl.program_id(2)
    expert = tl.load(blocks_pointer + block)
    if expert == num_experts:
        return
    y_row, present = rows_of_block(expert, block, order_pointer, start_pointer, ends_pointer, BLOCK_ROWS)
    x_row = y_row // ROWS_PER_TOKEN
    out = tile_out * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = expert * out_features + tl.minimum(out, out_features - 1)
    steps = tl.cdiv(in_features // 2, BLOCK_BYTES)
    accumulator = multiply_packed(
        operand_pointer,
        packed_pointer,
        multiplier_pointer,
        x_row,
        present,
        row,
        part * steps // SPLIT,
        (part + 1) * steps // SPLIT,
        in_features,
        HALF,
        GROUP,
        BLOCK_ROWS,
        BLOCK_OUT,
        BLOCK_BYTES,
        STAGES,
        EVEN,
        False,
        PTX,
    )
    finished = True
    if SPLIT > 1:
        tile = tile_out * blocks + block
        finished, accumulator = add_parts(
            accumulator, partial_pointer, counter_pointer, tile, part, BLOCK_ROWS, BLOCK_OUT, SPLIT
        )
    if finished:
        if GROUP == 0:
            accumulator = accumulator >> 4
        scale = tl.load(scale_pointer + x_row)
        y = accumulator.to(tl.float32) * scale[None, :] * tl.load(weight_scale_pointer + row)[:, None]
        offset = y_row[None, :] * out_features + out[:, None]
        mask = present[None, :] & (out < out_features)[:, None]
        tl.store(out_pointer + offset, y.to(out_pointer.dtype.element_ty), mask=mask)


@triton.jit
def grouped_gemv_kernel(
    operand_pointer,
    scale_pointer,
    experts_pointer,
    packed_pointer,
    multiplier_pointer,
    weight_scale_pointer,
    out_pointer,
    out_features,
    in_features,
    ROWS_PER_TOKEN: tl.constexpr,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK_WORDS: tl.constexpr,
    PTX: tl.constexpr,
):
    """Four output channels of one row; ``experts_pointer`` int ``[rows]``."""
    first = tl.program_id(0) * 4
    row = tl.program_id(1)
    token = row // ROWS_PER_TOKEN
    weight_row = tl.load(experts_pointer + row).to(tl.int64) * out_features
    groups = in_features // GROUP if GROUP > 0 else 0
    y = multiply_rows(
        operand_pointer + token.to(tl.int64) * tl.multiple_of(in_features // 4, 8),
        packed_pointer + weight_row * tl.multiple_of(in_features // 8, 4),
        multiplier_pointer + weight_row * groups,
        first,
        out_features,
        in_features,
        HALF,
        GROUP,
        CHUNKS,
        CHUNK_WORDS,
        PTX,
    )
    out = first + tl.arange(0, 4)
    mask = out < out_features
    y = y * tl.load(scale_pointer + token)
    y = y * tl.load(weight_scale_pointer + weight_row + out, mask=mask, other=0.0)
    offset = row.to(tl.int64) * out_features + out
    tl.store(out_pointer + offset, y.to(out_pointer.dtype.element_ty), mask=mask)
