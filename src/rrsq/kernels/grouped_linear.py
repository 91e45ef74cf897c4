"""The linears of a mixture of experts: each row of the result has a weight of its own.

Rows are sorted by the expert that multiplies them, on the device: no count ever reaches the host. A product
takes its rows in blocks that belong to one expert each. How many blocks an expert needs depends on the data;
how many there can be at most does not. So the table of blocks has that fixed length, and what is not needed
is marked. Few operations make it: at decode each of them counts.

The arithmetic of a block is that of :mod:`.packed_gemm`; where there are few rows, they are taken one by one
with that of :mod:`.gemv`. Sums of floats have a kernel of their own: with 16-bit activations ``code *
multiplier``, exact in either 16-bit dtype, meets them on the tensor cores, and the row's scale comes at the
end; with real group scales (arXiv 2409.20361, section 4) a step of K is one group: exact in int32, then
rescaled and added in float32. The experts of a weight lie one after the other, so that row ``n`` of expert
``e`` is row ``e * out_features + n``.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from typing import NamedTuple

import torch
from torch import Tensor

from ._triton import COMPILED, ceil_div, tl, triton
from .gemv import ROWS, multiply_rows
from .linear_group_scaled import linear_group_scaled
from .linear_int8 import FLOATING, linear_int8
from .linear_w4a16 import linear_w4a16
from .operation import Constraints, operation
from .packed_gemm import Tiles, add_parts, multiply_packed, read_step, unpack_step
from .packing import chunk_words, float_codes, pack_block, weight_sizes
from .plans import FusedPlan, GemvPlan

__all__ = [
    "Routing",
    "float_plan",
    "grouped_linear",
    "integer_plan",
    "launch_float",
    "launch_integer",
    "route_rows",
]

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


def _fake(
    operand: Tensor,
    scale: Tensor | None,
    group_scale: Tensor | None,
    tokens_per_set: int,
    experts: Tensor,
    order: Tensor,
    start: Tensor,
    ends: Tensor,
    blocks: Tensor,
    block_rows: int,
    rows_per_token: int,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_multiplier: Tensor | None,
    out_dtype: torch.dtype,
    *_: object,
) -> Tensor:
    return operand.new_empty((experts.shape[0], weight_packed.shape[1]), dtype=out_dtype)


def _sizes(
    operand: Tensor,
    scale: Tensor | None,
    group_scale: Tensor | None,
    tokens_per_set: int,
    experts: Tensor,
    order: Tensor,
    start: Tensor,
    ends: Tensor,
    blocks: Tensor,
    block_rows: int,
    rows_per_token: int,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_multiplier: Tensor | None,
    out_dtype: torch.dtype,
    unpacked: Tensor | None,
) -> tuple[tuple[str, int], ...]:
    weight = weight_sizes(weight_packed, weight_multiplier)
    if group_scale is None:
        return weight
    return *weight, ("group_size", operand.shape[1] // group_scale.shape[1])


@operation(
    fake=_fake,
    sizes=_sizes,
    dtypes=("operand", "out_dtype"),
    activations=11,
    typical={
        "operand": torch.int8,
        "out_dtype": torch.bfloat16,
        "in_features": 4096,
        "out_features": 4096,
        "weight_group_size": 32,
    },
)
def grouped_linear(
    operand: Tensor,
    scale: Tensor | None,
    group_scale: Tensor | None,
    tokens_per_set: int,
    experts: Tensor,
    order: Tensor,
    start: Tensor,
    ends: Tensor,
    blocks: Tensor,
    block_rows: int,
    rows_per_token: int,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_multiplier: Tensor | None,
    out_dtype: torch.dtype,
    unpacked: Tensor | None = None,
) -> Tensor:
    """The linears of a mixture of experts: ``y_rn = a_t w_en Σ_k operand_tk weight_enk`` with token
    ``t = r // rows_per_token`` and expert ``e = experts[r]``.

    The operand is what the recipe makes of activations: that of :func:`~rrsq.kernels.linear_int8` (``scale``
    only), of :func:`~rrsq.kernels.linear_group_scaled` (``scale`` and ``group_scale``) or of
    :func:`~rrsq.kernels.linear_w4a16` (neither). The reference is a loop over the experts that have rows,
    each product by the best kernel for it.

    Args:
        operand: int8 ``[tokens, in]``, or floating point.
        scale: float32 ``[tokens]``, or None for 16-bit activations.
        group_scale: float32 ``[sets, groups]`` or None.
        tokens_per_set: tokens that share a row of ``group_scale``.
        experts, order, start, ends, blocks, block_rows: the fields of a :class:`Routing` of ``tokens *
            rows_per_token`` rows, from :func:`route_rows`.
        rows_per_token: rows of the result that read the same token.
        weight_packed: uint8 ``[experts, out, in/2]``.
        weight_scale: float32 ``[experts, out]``.
        weight_multiplier: uint8 ``[experts, out, in/group]`` or None.
        out_dtype: dtype of the result.
        unpacked: int8 ``[experts, out, in]``; see :func:`~rrsq.kernels.linear_int8`.

    Returns:
        ``[rows, out]``.
    """
    out = torch.empty(experts.shape[0], weight_packed.shape[1], dtype=out_dtype, device=operand.device)
    for expert in experts.unique().tolist():
        rows = (experts == expert).nonzero().squeeze(1)
        tokens = rows // rows_per_token
        x = operand[tokens]
        weight = (
            weight_packed[expert],
            weight_scale[expert],
            None if weight_multiplier is None else weight_multiplier[expert],
        )
        whole = None if unpacked is None else unpacked[expert]
        if scale is None:
            y = linear_w4a16(x, *weight, None, whole).to(out_dtype)
        elif group_scale is None:
            y = linear_int8(x, scale[tokens], *weight, None, out_dtype, whole)
        else:
            per_token = group_scale[tokens // tokens_per_set]
            packed, rows_scale, multiplier = weight
            y = linear_group_scaled(
                x, scale[tokens], per_token, 1, packed, rows_scale, None, out_dtype, multiplier, whole
            )
        out[rows] = y
    return out


# Tile sizes. All need less than 100 KiB of shared memory.
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


@triton.jit
def _rows_of_block(expert, block, order_pointer, start_pointer, ends_pointer, BLOCK_ROWS: tl.constexpr):
    """Rows of a block of the table (:class:`Routing`) that is needed.

    Returns int64 ``[BLOCK_ROWS]``, the last row of the expert behind its end, and which of them are present.
    """
    before = tl.load(ends_pointer + expert - 1, mask=expert > 0, other=0)
    end = tl.load(start_pointer + expert + 1)
    position = tl.load(start_pointer + expert) + (block - before) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    return tl.load(order_pointer + tl.minimum(position, end - 1)), position < end


@triton.jit(do_not_specialize=["blocks", "num_experts"])
def _grouped_gemm_kernel(
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

    The table of blocks is that of :class:`Routing`, all of it int64. Row ``r`` of the
    result reads the token ``r // ROWS_PER_TOKEN``.
    """
    block = tl.program_id(0)
    tile_out = tl.program_id(1)
    part = tl.program_id(2)
    expert = tl.load(blocks_pointer + block)
    if expert == num_experts:
        return
    y_row, present = _rows_of_block(expert, block, order_pointer, start_pointer, ends_pointer, BLOCK_ROWS)
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
def _grouped_gemv_kernel(
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


@triton.jit
def _multiply_floats(
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
    arguments are those of :func:`.packed_gemm.multiply_packed`.
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
def _grouped_float_kernel(
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

    ``SORTED``: blocks are those of the table (see :func:`_grouped_gemm_kernel`); else each row
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
        y_row, present = _rows_of_block(expert, block, order_pointer, start_pointer, ends_pointer, BLOCK_ROWS)
    else:
        expert = tl.load(experts_pointer + block).to(tl.int64)
        row_in_block = tl.arange(0, BLOCK_ROWS)
        y_row = (row_in_block * 0 + block).to(tl.int64)
        present = row_in_block == 0
    x_row = y_row // ROWS_PER_TOKEN
    out = tile_out * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = expert * out_features + tl.minimum(out, out_features - 1)
    steps = tl.cdiv(in_features // 2, BLOCK_BYTES)
    total = _multiply_floats(
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


@grouped_linear.kernel(
    "triton",
    Constraints.on_gpu(
        dtypes={
            "operand": frozenset({torch.int8, torch.float16, torch.bfloat16}),
            "out_dtype": FLOATING,
        },
        divisible={"in_features": 64},
        at_least={"weight_group_size": 16, "group_size": 128},  # A whole packing block.
        at_most={"group_size": 256},
        power_of_two=frozenset({"weight_group_size", "group_size"}),
    ),
)
def _launch(
    operand: Tensor,
    scale: Tensor | None,
    group_scale: Tensor | None,
    tokens_per_set: int,
    experts: Tensor,
    order: Tensor,
    start: Tensor,
    ends: Tensor,
    blocks: Tensor,
    block_rows: int,
    rows_per_token: int,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_multiplier: Tensor | None,
    out_dtype: torch.dtype,
    unpacked: Tensor | None,
) -> Tensor:
    num_experts, out_features, row_bytes = weight_packed.shape
    out = torch.empty(experts.shape[0], out_features, dtype=out_dtype, device=operand.device)
    if not experts.shape[0]:
        return out
    operand = operand.contiguous()
    routing = Routing(experts, order, start, ends, blocks, block_rows)
    sizes = block_rows, min(experts.shape[0], num_experts), out_features, row_bytes
    weight = weight_packed, weight_scale, weight_multiplier
    if scale is None or group_scale is not None:
        group_size = None if group_scale is None else operand.shape[1] // group_scale.shape[1]
        scales = scale, group_scale, tokens_per_set
        launch_float(float_plan(*sizes, group_size), operand, *scales, routing, rows_per_token, *weight, out)
    else:
        launch_integer(integer_plan(*sizes), operand, scale, routing, rows_per_token, *weight, out)
    return out


def launch_integer(
    plan: GemvPlan | FusedPlan,
    operand: Tensor,
    scale: Tensor,
    routing: Routing,
    rows_per_token: int,
    packed: Tensor,
    weight_scale: Tensor,
    multiplier: Tensor | None,
    out: Tensor,
) -> None:
    """Compute ``out`` ``[rows, out_features]`` by ``plan``; its ``block_tokens`` are a block's rows."""
    in_features = operand.shape[1]
    out_features = packed.shape[1]
    group_size = 0 if multiplier is None else in_features // multiplier.shape[2]
    half = pack_block(in_features) // 2
    if isinstance(plan, GemvPlan):
        _grouped_gemv_kernel[(ceil_div(out_features, ROWS), out.shape[0])](
            operand.view(torch.int32),
            scale,
            routing.experts,
            packed.view(torch.int32),
            packed if multiplier is None else multiplier,
            weight_scale,
            out,
            out_features,
            in_features,
            ROWS_PER_TOKEN=rows_per_token,
            HALF=half,
            GROUP=group_size,
            CHUNKS=plan.chunks,
            CHUNK_WORDS=chunk_words(group_size),
            PTX=COMPILED,
            enable_fp_fusion=False,
            num_warps=plan.warps,
        )
        return
    blocks = routing.blocks.shape[0]
    tiles_out = ceil_div(out_features, plan.block_out)
    tiles = Tiles.of_blocks(plan, blocks, tiles_out, packed.shape[2])
    partial, meeting = tiles.room(torch.int32, scale)
    _grouped_gemm_kernel[tiles.grid](
        operand,
        scale,
        routing.order,
        routing.start,
        routing.ends,
        routing.blocks,
        packed,
        packed if multiplier is None else multiplier,
        weight_scale,
        out,
        partial,
        meeting,
        blocks,
        packed.shape[0],
        out_features,
        in_features,
        ROWS_PER_TOKEN=rows_per_token,
        HALF=half,
        GROUP=group_size,
        BLOCK_ROWS=plan.block_tokens,
        BLOCK_OUT=plan.block_out,
        BLOCK_BYTES=plan.block_bytes,
        SPLIT=tiles.grid[2],
        STAGES=plan.stages,
        EVEN=packed.shape[2] % plan.block_bytes == 0,
        PTX=COMPILED,
        enable_fp_fusion=False,
        num_warps=plan.warps,
        num_stages=plan.stages,
    )


def launch_float(
    plan: FusedPlan,
    operand: Tensor,
    scale: Tensor | None,
    group_scale: Tensor | None,
    tokens_per_set: int,
    routing: Routing,
    rows_per_token: int,
    packed: Tensor,
    weight_scale: Tensor,
    multiplier: Tensor | None,
    out: Tensor,
) -> None:
    """Compute ``out`` ``[rows, out_features]`` by ``plan``; its ``block_tokens`` are a block's rows."""
    num_experts, out_features, row_bytes = packed.shape
    in_features = operand.shape[1]
    is_sorted = routing.block_rows > 1
    blocks = routing.blocks.shape[0] if is_sorted else out.shape[0]
    tiles_out = ceil_div(out_features, plan.block_out)
    tiles = Tiles.of_blocks(plan, blocks, tiles_out, row_bytes)
    partial, meeting = tiles.room(torch.float32, weight_scale)
    _grouped_float_kernel[tiles.grid](
        operand,
        operand if scale is None else scale,
        operand if group_scale is None else group_scale.contiguous(),
        routing.experts,
        routing.order,
        routing.start,
        routing.ends,
        routing.blocks,
        packed,
        packed if multiplier is None else multiplier,
        weight_scale,
        out,
        partial,
        meeting,
        blocks,
        num_experts,
        tokens_per_set,
        out_features,
        in_features,
        ROWS_PER_TOKEN=rows_per_token,
        HALF=pack_block(in_features) // 2,
        GROUP=0 if multiplier is None else in_features // multiplier.shape[2],
        SMOOTHED=group_scale is not None,
        SORTED=is_sorted,
        BLOCK_ROWS=plan.block_tokens,
        BLOCK_OUT=plan.block_out,
        BLOCK_BYTES=plan.block_bytes,
        SPLIT=tiles.grid[2],
        STAGES=plan.stages,
        EVEN=row_bytes % plan.block_bytes == 0,
        PTX=COMPILED,
        enable_fp_fusion=True,
        num_warps=plan.warps,
        num_stages=plan.stages,
    )
