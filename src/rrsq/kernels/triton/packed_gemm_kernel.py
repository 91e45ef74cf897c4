"""The product with packed weights unpacked in registers: small and medium numbers of tokens.

It computes Y^T = W X^T, so that the weight is the left operand, which the tensor cores take from registers: what
is unpacked there need not go back to shared memory. K is split over programs where the output has too few tiles
to fill the GPU; the partial sums are integers and are added by the program that arrives last, in a fixed order,
so results are deterministic.
"""

import triton
import triton.language as tl

from .nibbles import scaled_high, scaled_low, sixteenfold_high, sixteenfold_low

__all__ = ["packed_gemm_kernel"]


@triton.jit
def _spread(multiplier, ROWS: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr):
    """Repeat each of ``[ROWS, GROUPS]`` multipliers ``SPAN`` times along the row."""
    return tl.broadcast_to(multiplier[:, :, None], [ROWS, GROUPS, SPAN]).reshape(ROWS, GROUPS * SPAN)


@triton.jit(do_not_specialize=["tokens"])
def packed_gemm_kernel(
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
    PTX: tl.constexpr,
):
    """One tile ``[BLOCK_OUT, BLOCK_TOKENS]`` of Y^T, or one of its ``SPLIT`` parts.

    ``BLOCK_BYTES`` packed bytes of each weight row are taken in a step. ``SPAN``, the bytes of a step whose low
    nibbles share a multiplier, is ``min(GROUP, HALF, BLOCK_BYTES)``. ``EVEN``: the step divides the row.
    ``partial_pointer`` int32 ``[tiles, SPLIT, BLOCK_OUT, BLOCK_TOKENS]``; ``counter_pointer`` int32 ``[tiles]``,
    zero before and after.
    """
    tile_token = tl.program_id(0)
    tile_out = tl.program_id(1)
    part = tl.program_id(2)
    row_bytes = in_features // 2
    out = tile_out * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = tl.minimum(out, out_features - 1).to(tl.int64)
    token = tile_token * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    x_row = tl.minimum(token, tokens - 1).to(tl.int64)
    steps = tl.cdiv(row_bytes, BLOCK_BYTES)
    first = part * steps // SPLIT
    last = (part + 1) * steps // SPLIT
    step_byte = tl.arange(0, BLOCK_BYTES)
    accumulator = tl.zeros([BLOCK_OUT, BLOCK_TOKENS], tl.int32)
    for step in tl.range(first, last, num_stages=STAGES):
        byte = step * BLOCK_BYTES + step_byte
        channel = (byte // HALF) * (2 * HALF) + byte % HALF
        channel = tl.max_contiguous(tl.multiple_of(channel, 16), 16)
        packed_pointers = packed_pointer + (row * row_bytes)[:, None] + byte[None, :]
        x_pointers = operand_pointer + (x_row * in_features)[None, :] + channel[:, None]
        if EVEN:
            packed = tl.load(packed_pointers)
            x_low = tl.load(x_pointers)
            x_high = tl.load(x_pointers + HALF)
        else:
            packed = tl.load(packed_pointers, mask=(byte < row_bytes)[None, :], other=0)
            x_low = tl.load(x_pointers, mask=(byte < row_bytes)[:, None], other=0)
            x_high = tl.load(x_pointers + HALF, mask=(byte < row_bytes)[:, None], other=0)
        if GROUP > 0:
            SMALLER: tl.constexpr = GROUP if GROUP < HALF else HALF
            SPAN: tl.constexpr = SMALLER if SMALLER < BLOCK_BYTES else BLOCK_BYTES
            SPANS: tl.constexpr = BLOCK_BYTES // SPAN
            span_byte = step * BLOCK_BYTES + tl.arange(0, SPANS) * SPAN
            span_channel = (span_byte // HALF) * (2 * HALF) + span_byte % HALF
            groups = in_features // GROUP
            multiplier = multiplier_pointer + (row * groups)[:, None]
            low_group = tl.minimum(span_channel // GROUP, groups - 1)
            high_group = tl.minimum((span_channel + HALF) // GROUP, groups - 1)
            low_multiplier = tl.load(multiplier + low_group[None, :])
            high_multiplier = tl.load(multiplier + high_group[None, :])
            low = scaled_low(packed, _spread(low_multiplier, BLOCK_OUT, SPANS, SPAN), PTX)
            high = scaled_high(packed, _spread(high_multiplier, BLOCK_OUT, SPANS, SPAN), PTX)
        else:
            low = sixteenfold_low(packed, PTX)
            high = sixteenfold_high(packed, PTX)
        accumulator = tl.dot(low, x_low, accumulator, out_dtype=tl.int32)
        accumulator = tl.dot(high, x_high, accumulator, out_dtype=tl.int32)
    finished = True
    if SPLIT > 1:
        tile = tile_out * tl.num_programs(0) + tile_token
        TILE: tl.constexpr = BLOCK_OUT * BLOCK_TOKENS
        inside = tl.arange(0, BLOCK_OUT)[:, None] * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[None, :]
        mine = partial_pointer + tile.to(tl.int64) * (SPLIT * TILE) + inside
        tl.store(mine + part * TILE, accumulator)
        tl.debug_barrier()
        arrived = tl.atomic_add(counter_pointer + tile, 1, sem="acq_rel", scope="gpu")
        finished = arrived == SPLIT - 1
        if finished:
            accumulator = tl.zeros([BLOCK_OUT, BLOCK_TOKENS], tl.int32)
            for other in tl.static_range(SPLIT):
                accumulator += tl.load(mine + other * TILE, cache_modifier=".cg")
            tl.store(counter_pointer + tile, 0)
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
