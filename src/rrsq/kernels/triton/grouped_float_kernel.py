"""The products of a mixture of experts whose sums are floats: 16-bit activations, or real group scales.

The weights are read as in :mod:`.packed_gemm_kernel`. With 16-bit activations ``code * multiplier``, exact in
either 16-bit dtype, meets them on the tensor cores, and the row's scale comes at the end. With real group
scales (arXiv 2409.20361, section 4) a step of K is one group: exact in int32, then rescaled and added in
float32.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import triton
import triton.language as tl

from ..packing import float_codes
from .grouped_kernel import rows_of_block
from .packed_gemm_kernel import add_parts, read_step, unpack_step

__all__ = ["grouped_float_kernel"]


@triton.jit
def _multiply(
    operand_pointer,
    group_scale_pointer,
    packed_pointer,
    multiplier_pointer,
    x_row,
    scale_row,
    present,
    row,
    first,
    last,
    in_features,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    SMOOTHED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
    PTX: tl.constexpr,
):
    """``weight[row] @ operand[x_row].T`` over some steps of K, float32 ``[BLOCK_OUT, BLOCK_ROWS]``.

    With ``SMOOTHED`` the operand's groups are rescaled by row ``scale_row`` of the group scales. Other
    arguments are those of :func:`.packed_gemm_kernel.multiply_packed`.
    """
    total = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
    group_scales = group_scale_pointer + scale_row * (in_features // (2 * BLOCK_BYTES))
    for step in tl.range(first, last, num_stages=STAGES):
        packed, low_multiplier, high_multiplier, x_low, x_high = read_step(
            operand_pointer,
            packed_pointer,
            multiplier_pointer,
            x_row,
            present,
            row,
            step,
            in_features,
            HALF,
            GROUP,
            BLOCK_OUT,
            BLOCK_BYTES,
            EVEN,
            False,
        )
        if SMOOTHED:
            low, high = unpack_step(packed, low_multiplier, high_multiplier, GROUP, PTX)
            part = tl.dot(low, x_low, out_dtype=tl.int32)
            part = tl.dot(high, x_high, part, out_dtype=tl.int32)
            total += part.to(tl.float32) * tl.load(group_scales + step)[None, :]
        else:
            low = float_codes(packed & 0xF, low_multiplier, x_low.dtype, GROUP, PTX)
            high = float_codes(packed >> 4, high_multiplier, x_low.dtype, GROUP, PTX)
            # Summed apart, so that the tensor cores are done with the weights' registers when the step ends:
            # Triton 3.6 lets the next step overwrite them under an asynchronous product that reads them.
            part = tl.dot(low, x_low.to(low.dtype))
            total += tl.dot(high, x_high.to(high.dtype), part)
    if SMOOTHED and GROUP == 0:
        total *= 0.0625
    return total


@triton.jit(do_not_specialize=["num_blocks", "num_experts", "tokens_per_set"])
def grouped_float_kernel(
    operand_pointer,
    scale_pointer,
    group_scale_pointer,
    experts_pointer,
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
    num_blocks,
    num_experts,
    tokens_per_set,
    out_features,
    in_features,
    ROWS_PER_TOKEN: tl.constexpr,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    SMOOTHED: tl.constexpr,
    SORTED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
    PTX: tl.constexpr,
):
    """One tile ``[BLOCK_OUT, BLOCK_ROWS]`` of Y^T of one block, or one of its ``SPLIT`` parts.

    ``SORTED``: blocks are those of the table (see :func:`.grouped_kernel.grouped_gemm_kernel`); else each row
    is one. ``SMOOTHED``: the operand is int8 with scales and group scales, and a step is one of its groups;
    else it has 16 bits and no scales.
    """
    block = tl.program_id(0)
    tile_out = tl.program_id(1)
    part = tl.program_id(2)
    if SORTED:
        expert = tl.load(blocks_pointer + block)
        if expert == num_experts:
            return
        y_row, present = rows_of_block(expert, block, order_pointer, start_pointer, ends_pointer, BLOCK_ROWS)
    else:
        expert = tl.load(experts_pointer + block).to(tl.int64)
        row_in_block = tl.arange(0, BLOCK_ROWS)
        y_row = (row_in_block * 0 + block).to(tl.int64)
        present = row_in_block == 0
    x_row = y_row // ROWS_PER_TOKEN
    out = tile_out * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = expert * out_features + tl.minimum(out, out_features - 1)
    steps = tl.cdiv(in_features // 2, BLOCK_BYTES)
    total = _multiply(
        operand_pointer,
        group_scale_pointer,
        packed_pointer,
        multiplier_pointer,
        x_row,
        x_row // tokens_per_set,
        present,
        row,
        part * steps // SPLIT,
        (part + 1) * steps // SPLIT,
        in_features,
        HALF,
        GROUP,
        SMOOTHED,
        BLOCK_ROWS,
        BLOCK_OUT,
        BLOCK_BYTES,
        STAGES,
        EVEN,
        PTX,
    )
    finished = True
    if SPLIT > 1:
        tile = tile_out * num_blocks + block
        finished, total = add_parts(
            total, partial_pointer, counter_pointer, tile, part, BLOCK_ROWS, BLOCK_OUT, SPLIT
        )
    if finished:
        y = total * tl.load(weight_scale_pointer + row)[:, None]
        if SMOOTHED:
            y *= tl.load(scale_pointer + x_row)[None, :]
        offset = y_row[None, :] * out_features + out[:, None]
        mask = present[None, :] & (out < out_features)[:, None]
        tl.store(out_pointer + offset, y.to(out_pointer.dtype.element_ty), mask=mask)
