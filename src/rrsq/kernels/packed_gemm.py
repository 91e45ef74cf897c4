"""The product with packed weights unpacked in registers: small and medium numbers of tokens.

It computes Y^T = W X^T, so that the weight is the left operand, which the tensor cores take from registers:
what is unpacked there need not go back to shared memory. K is split over programs where the output has too
few tiles to fill the GPU; the partial sums are integers and are added by the program that arrives last, in a
fixed order, so results are deterministic.

Programs that share a sum leave their parts in memory and count who has arrived. Counters are zero before
every launch, and left at zero by every launch. Calls on one stream (of a CPU: in one thread) follow each
other, so they share room for parts and counters, which is kept. A call that is captured in a CUDA graph may
be replayed at any time: its parts are the graph's own, and its counters come from a reserve that is allocated
outside of capture. Where the reserve is used up, or missing because nothing ran before the capture, the graph
clears its own.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._triton import COMPILED, ceil_div, tl, triton
from .packing import (
    group_size_of,
    pack_block,
    scaled_high,
    scaled_low,
    sixteenfold_high,
    sixteenfold_low,
)
from .plans import FusedPlan

__all__ = [
    "MAXIMUM_COUNTERS",
    "Tiles",
    "add_parts",
    "multiply_packed",
    "prepared_packed_gemm",
    "read_step",
    "unpack_step",
]

MAXIMUM_COUNTERS = 4096
_RESERVE = 1 << 20
_KEPT_PARTS = 1 << 22
"""At most: 16 MiB a stream, more than 64 tokens need. For more sums, memory is allocated in each call."""
Room = tuple[Tensor, Tensor]
"""For parts of sums, and zero counters, int32."""
_rooms: dict[tuple[int, int, torch.dtype], Room] = {}
"""By device, stream and dtype of the sums."""
_reserves: dict[torch.device, tuple[Tensor, int]] = {}


def _more_room(stream: tuple[int, int, torch.dtype], parts: int, device: torch.device) -> Room:
    """Room for so many parts, kept for the stream; with the first on a device, the reserve of graphs."""
    made = torch.empty(parts, dtype=stream[2], device=device)
    if stream not in _rooms:
        if device.type == "cuda" and device not in _reserves:
            _reserves[device] = (torch.zeros(_RESERVE, dtype=torch.int32, device=device), 0)
            torch.cuda.current_stream(device).synchronize()
        _rooms[stream] = made.new_empty(0), torch.zeros(MAXIMUM_COUNTERS, dtype=torch.int32, device=device)
    room = made, _rooms[stream][1]
    if parts <= _KEPT_PARTS:
        _rooms[stream] = room
    return room


def _counters_of_graph(count: int, device: torch.device) -> Tensor:
    """``count`` zero int32 for one launch that is being captured."""
    reserve, used = _reserves.get(device, (None, _RESERVE))
    if reserve is None or used + count > _RESERVE:
        return torch.zeros(count, dtype=torch.int32, device=device)
    _reserves[device] = (reserve, used + count)
    return reserve[used : used + count]


class Tiles(NamedTuple):
    """How a product of some tokens is cut."""

    grid: tuple[int, int, int]
    """Tiles of tokens, tiles of output channels, programs that share a tile's sum over K."""
    parts: int
    """Sums in all programs together."""

    @classmethod
    def of(cls, plan: FusedPlan, tokens: int, out_features: int, row_bytes: int) -> Tiles:
        """By a plan, which asks for ``plan.split``; there are no more parts than steps of K.

        ``row_bytes``: of the codes in a weight row.
        """
        tiles_out = ceil_div(out_features, plan.block_out)
        return cls.of_blocks(plan, ceil_div(tokens, plan.block_tokens), tiles_out, row_bytes)

    @classmethod
    def of_blocks(cls, plan: FusedPlan, tiles_token: int, tiles_out: int, row_bytes: int) -> Tiles:
        """The same of tiles."""
        tiles = tiles_token * tiles_out
        split = 1 if tiles > MAXIMUM_COUNTERS else min(plan.split, ceil_div(row_bytes, plan.block_bytes))
        return cls((tiles_token, tiles_out, split), tiles * split * plan.block_out * plan.block_tokens)

    def room(self, dtype: torch.dtype, unused: Tensor) -> Room:
        """Room for parts of sums, and the tiles' counters, for one launch on the current stream.

        ``unused``, a tensor on the device, stands for both where nothing is split.
        """
        tiles_token, tiles_out, split = self.grid
        if split == 1:
            return unused, unused
        device = unused.get_device()  # Of a CPU -1.
        if device < 0:
            stream = device, threading.get_ident(), dtype
        elif torch.cuda.is_current_stream_capturing():
            counters = _counters_of_graph(tiles_token * tiles_out, unused.device)
            return torch.empty(self.parts, dtype=dtype, device=unused.device), counters
        else:
            stream = device, torch._C._cuda_getCurrentRawStream(device), dtype
        room = _rooms.get(stream)
        if room is None or room[0].numel() < self.parts:
            room = _more_room(stream, self.parts, unused.device)
        return room


@triton.jit
def _spread(multiplier, ROWS: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr):
    """Repeat each of ``[ROWS, GROUPS]`` multipliers ``SPAN`` times along the row."""
    return tl.broadcast_to(multiplier[:, :, None], [ROWS, GROUPS, SPAN]).reshape(ROWS, GROUPS * SPAN)


@triton.jit
def read_step(
    operand_pointer,
    packed_pointer,
    multiplier_pointer,
    x_row,
    present,
    row,
    step,
    in_features,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    EVEN: tl.constexpr,
    FULL: tl.constexpr,
):
    """One step of K: packed bytes of the weight, its multipliers, and the channels that the nibbles meet.

    Arguments are those of :func:`multiply_packed`. Returns uint8 ``[BLOCK_OUT, BLOCK_BYTES]``; uint8 of the
    same shape for low and for high nibbles (anything without multipliers); and the operand of low and of high
    nibbles ``[BLOCK_BYTES, BLOCK_TOKENS]``.
    """
    row_bytes = tl.multiple_of(in_features // 2, 16)
    byte = step * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)
    channel = (byte // HALF) * (2 * HALF) + byte % HALF
    channel = tl.max_contiguous(tl.multiple_of(channel, 16), 16)
    packed_pointers = packed_pointer + (row * row_bytes)[:, None] + byte[None, :]
    x_pointers = operand_pointer + (x_row * in_features)[None, :] + channel[:, None]
    if EVEN:
        packed = tl.load(packed_pointers)
        if FULL:
            x_low = tl.load(x_pointers)
            x_high = tl.load(x_pointers + HALF)
        else:
            x_low = tl.load(x_pointers, mask=present[None, :], other=0)
            x_high = tl.load(x_pointers + HALF, mask=present[None, :], other=0)
    else:
        packed = tl.load(packed_pointers, mask=(byte < row_bytes)[None, :], other=0)
        inside = (byte < row_bytes)[:, None] & present[None, :]
        x_low = tl.load(x_pointers, mask=inside, other=0)
        x_high = tl.load(x_pointers + HALF, mask=inside, other=0)
    low_multiplier = packed
    high_multiplier = packed
    if GROUP > 0:
        # A step's multipliers are neighbours in memory: one small pipelined load, split in registers.
        MULTIPLIERS: tl.constexpr = 2 * BLOCK_BYTES // GROUP if 2 * BLOCK_BYTES > GROUP else 1
        SPAN: tl.constexpr = GROUP if GROUP < HALF else HALF
        groups = in_features // GROUP
        if GROUP == 32 and HALF == 64:
            groups = tl.multiple_of(groups, 4)
        group = step * (2 * BLOCK_BYTES) // GROUP + tl.arange(0, MULTIPLIERS)
        if not EVEN:
            group = tl.minimum(group, groups - 1)
        multiplier = tl.load(multiplier_pointer + (row * groups)[:, None] + group[None, :])
        if GROUP <= HALF:
            halves = multiplier.reshape(BLOCK_OUT, BLOCK_BYTES // HALF, 2, HALF // SPAN).permute(0, 1, 3, 2)
            low_each, high_each = tl.split(halves)
            low_each = low_each.reshape(BLOCK_OUT, BLOCK_BYTES // SPAN)
            high_each = high_each.reshape(BLOCK_OUT, BLOCK_BYTES // SPAN)
        else:
            REPEAT: tl.constexpr = BLOCK_BYTES // HALF // MULTIPLIERS
            low_each = _spread(multiplier, BLOCK_OUT, MULTIPLIERS, REPEAT)
            high_each = low_each
        low_multiplier = _spread(low_each, BLOCK_OUT, BLOCK_BYTES // SPAN, SPAN)
        high_multiplier = _spread(high_each, BLOCK_OUT, BLOCK_BYTES // SPAN, SPAN)
    return packed, low_multiplier, high_multiplier, x_low, x_high


@triton.jit
def unpack_step(packed, low_multiplier, high_multiplier, GROUP: tl.constexpr, PTX: tl.constexpr):
    """Low and high nibbles of a step times their multipliers as int8; 16 times their codes without any.

    For 8-bit products only: the registers that these take hold four codes of one row.
    """
    if GROUP > 0:
        low = scaled_low(packed, low_multiplier, PTX)
        high = scaled_high(packed, high_multiplier, PTX)
    else:
        low = sixteenfold_low(packed, PTX)
        high = sixteenfold_high(packed, PTX)
    return low, high


@triton.jit
def multiply_packed(
    operand_pointer,
    packed_pointer,
    multiplier_pointer,
    x_row,
    present,
    row,
    first,
    last,
    in_features,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
    FULL: tl.constexpr,
    PTX: tl.constexpr,
):
    """``weight[row] @ operand[x_row].T`` over the steps ``first`` to ``last`` of K.

    ``row`` int64 ``[BLOCK_OUT]`` and ``x_row`` int64 ``[BLOCK_TOKENS]``, of which those that are ``present``
    are read; ``FULL``: all. A step takes ``BLOCK_BYTES`` packed bytes of each row, a multiple of ``HALF``;
    ``EVEN``: it divides the row. Returns int32 ``[BLOCK_OUT, BLOCK_TOKENS]``, 16 times the sums where there
    are no multipliers (``GROUP`` 0).
    """
    accumulator = tl.zeros([BLOCK_OUT, BLOCK_TOKENS], tl.int32)
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
            FULL,
        )
        low, high = unpack_step(packed, low_multiplier, high_multiplier, GROUP, PTX)
        accumulator = tl.dot(low, x_low, accumulator, out_dtype=tl.int32)
        accumulator = tl.dot(high, x_high, accumulator, out_dtype=tl.int32)
    return accumulator


@triton.jit
def add_parts(
    accumulator,
    partial_pointer,
    counter_pointer,
    tile,
    part,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Leave a part's sums in memory; the program that arrives last gets the total of its tile.

    ``partial_pointer`` ``[tiles, SPLIT, BLOCK_OUT, BLOCK_TOKENS]`` of the sums' dtype; ``counter_pointer``
    int32 ``[tiles]``, zero before and after. Returns whether this program is the last one, and the total if
    it is.
    """
    TILE: tl.constexpr = BLOCK_OUT * BLOCK_TOKENS
    inside = tl.arange(0, BLOCK_OUT)[:, None] * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[None, :]
    mine = partial_pointer + tile.to(tl.int64) * (SPLIT * TILE) + inside
    tl.store(mine + part * TILE, accumulator)
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_pointer + tile, 1, sem="acq_rel", scope="gpu")
    finished = arrived == SPLIT - 1
    if finished:
        accumulator = tl.zeros([BLOCK_OUT, BLOCK_TOKENS], accumulator.dtype)
        for other in tl.static_range(SPLIT):
            accumulator += tl.load(mine + other * TILE, cache_modifier=".cg")
        tl.store(counter_pointer + tile, 0)
    return finished, accumulator


@triton.jit(do_not_specialize=["tokens"])
def _packed_gemm_kernel(
    operand_pointer,
    scale_pointer,
    packed_pointer,
    multiplier_pointer,
    weight_scale_pointer,
    bias_pointer,
    out_pointer,
    partial_pointer,
    counter_pointer,
    tokens,
    out_features,
    in_features,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
    FULL: tl.constexpr,
    PTX: tl.constexpr,
):
    """One tile ``[BLOCK_OUT, BLOCK_TOKENS]`` of Y^T, or one of its ``SPLIT`` parts.

    ``partial_pointer`` and ``counter_pointer``: see :func:`add_parts`.
    """
    tile_token = tl.program_id(0)
    tile_out = tl.program_id(1)
    part = tl.program_id(2)
    out = tile_out * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = tl.minimum(out, out_features - 1).to(tl.int64)
    token = tile_token * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    x_row = tl.minimum(token, tokens - 1).to(tl.int64)
    steps = tl.cdiv(in_features // 2, BLOCK_BYTES)
    first = part * steps // SPLIT
    last = (part + 1) * steps // SPLIT
    accumulator = multiply_packed(
        operand_pointer,
        packed_pointer,
        multiplier_pointer,
        x_row,
        token < tokens,
        row,
        first,
        last,
        in_features,
        HALF,
        GROUP,
        BLOCK_TOKENS,
        BLOCK_OUT,
        BLOCK_BYTES,
        STAGES,
        EVEN,
        FULL,
        PTX,
    )
    finished = True
    if SPLIT > 1:
        tile = tile_out * tl.num_programs(0) + tile_token
        finished, accumulator = add_parts(
            accumulator, partial_pointer, counter_pointer, tile, part, BLOCK_TOKENS, BLOCK_OUT, SPLIT
        )
    if finished:
        if GROUP == 0:
            accumulator = accumulator >> 4
        scale = tl.load(scale_pointer + x_row)
        y = accumulator.to(tl.float32) * scale[None, :] * tl.load(weight_scale_pointer + row)[:, None]
        if HAS_BIAS:
            y += tl.load(bias_pointer + row).to(tl.float32)[:, None]
        offset = token.to(tl.int64)[None, :] * out_features + out[:, None]
        mask = (token < tokens)[None, :] & (out < out_features)[:, None]
        tl.store(out_pointer + offset, y.to(out_pointer.dtype.element_ty), mask=mask)


def prepared_packed_gemm(
    plan: FusedPlan,
    packed: Tensor,
    weight_scale: Tensor,
    multiplier: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    leading: tuple[int, ...],
) -> Callable[..., Tensor]:
    """For one weight, a function of ``operand`` and ``scale`` (and ``out``, if it is there) to ``out``.

    ``out`` ``[*leading, out_features]`` is that of :func:`rrsq.kernels.linear_int8`. Other numbers of tokens
    than those of ``leading`` bring their ``out``.
    """
    (out_features, row_bytes), device = packed.shape, packed.device
    in_features, shape, usual = 2 * row_bytes, (*leading, out_features), math.prod(leading)
    usual_tiles = Tiles.of(plan, usual, out_features, row_bytes)
    usual_kernel = _packed_gemm_kernel[usual_tiles.grid]
    multipliers = packed if multiplier is None else multiplier
    biases, has_bias = (weight_scale, False) if bias is None else (bias, True)
    half, group_size = pack_block(in_features) // 2, group_size_of(in_features, multiplier)
    even = row_bytes % plan.block_bytes == 0
    block_tokens, block_out, block_bytes = plan.block_tokens, plan.block_out, plan.block_bytes
    warps, stages = plan.warps, plan.stages

    def run(operand: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
        tokens, tiles, kernel = usual, usual_tiles, usual_kernel
        if out is None:
            out = torch.empty(*shape, dtype=out_dtype, device=device)
        elif out.shape != shape:
            tokens = out.numel() // out_features
            tiles = Tiles.of(plan, tokens, out_features, row_bytes)
            kernel = _packed_gemm_kernel[tiles.grid]
        partial, meeting = tiles.room(torch.int32, scale)
        kernel(
            operand,
            scale,
            packed,
            multipliers,
            weight_scale,
            biases,
            out,
            partial,
            meeting,
            tokens,
            out_features,
            in_features,
            half,
            group_size,
            has_bias,
            block_tokens,
            block_out,
            block_bytes,
            tiles.grid[2],
            stages,
            even,
            tokens % block_tokens == 0,
            COMPILED,
            enable_fp_fusion=False,
            num_warps=warps,
            num_stages=stages,
        )
        return out

    return run
