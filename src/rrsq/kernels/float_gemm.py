"""The product of a few tokens in 16 bits with 4- or 8-bit codes, which become floats in registers.

It computes Y^T = W X^T as :mod:`.packed_gemm` does, from integer weights that either 16-bit dtype holds
exactly, summed in float32; a row's scale and bias come at the end, in float32 too. K is split over programs
where the output has too few tiles; their parts are added in a fixed order, so results are deterministic.
Products of more tokens are bound by arithmetic: there a pass that dequantizes the weight costs less.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ._triton import COMPILED, ceil_div, next_power_of_two, tl, triton
from .packed_gemm import Tiles, add_parts, read_step
from .packing import float_bytes, float_nibbles, group_size_of, pack_block
from .plans import FusedPlan

__all__ = ["MAXIMUM_TOKENS", "float_gemm_plan", "prepared_float_gemm"]

MAXIMUM_TOKENS = 64
"""Tokens up to which this product is taken."""
_LEAST_TOKENS = 16  # Of a tile on the tensor cores.
_ENOUGH_TILES = 512


def float_gemm_plan(tokens: int, out_features: int, row_bytes: int, bits: int = 4) -> FusedPlan:
    """Tile sizes for ``tokens`` up to :data:`MAXIMUM_TOKENS` and rows of ``row_bytes`` bytes of codes.

    The more tokens, the more rows share what a program reads of the activations.
    """
    block_tokens = max(next_power_of_two(tokens), _LEAST_TOKENS)
    block_out, block_bytes = (64, 128) if block_tokens == _LEAST_TOKENS else (128, 64)
    if bits == 8:
        block_bytes = 128
    split = 1
    while ceil_div(out_features, block_out) * split < _ENOUGH_TILES and 512 * split <= row_bytes:
        split *= 2
    return FusedPlan(block_tokens, block_out, block_bytes, split, 4, 4 if block_tokens < 64 else 3)


@triton.jit
def _read_bytes(
    x_pointer,
    codes_pointer,
    x_row,
    present,
    row,
    first,
    in_features,
    CHANNELS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """int8 codes ``[BLOCK_OUT, CHANNELS]`` from ``first`` on, and ``[CHANNELS, BLOCK_TOKENS]`` they meet.

    ``in_features`` is a multiple of 16.
    """
    stride = tl.multiple_of(in_features, 16)
    channel = first + tl.arange(0, CHANNELS)
    codes_pointers = codes_pointer + (row * stride)[:, None] + channel[None, :]
    x_pointers = x_pointer + (x_row * stride)[None, :] + channel[:, None]
    if EVEN:
        codes = tl.load(codes_pointers)
        x = tl.load(x_pointers, mask=present[None, :], other=0)
    else:
        inside = channel < in_features
        codes = tl.load(codes_pointers, mask=inside[None, :], other=0)
        x = tl.load(x_pointers, mask=inside[:, None] & present[None, :], other=0)
    return codes, x


@triton.jit(do_not_specialize=["tokens"])
def _float_gemm_kernel(
    x_pointer,
    codes_pointer,
    multiplier_pointer,
    weight_scale_pointer,
    bias_pointer,
    out_pointer,
    partial_pointer,
    counter_pointer,
    tokens,
    out_features,
    in_features,
    BITS: tl.constexpr,
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
    """One tile ``[BLOCK_OUT, BLOCK_TOKENS]`` of Y^T, or one of its ``SPLIT`` parts (:func:`.add_parts`).

    ``BITS`` 4: ``codes_pointer`` is uint8 ``[out, in/2]`` in packing blocks of ``2 * HALF`` channels, with
    multipliers of ``GROUP`` channels (0: none). ``BITS`` 8: int8 ``[out, in]``. A step of K takes
    ``BLOCK_BYTES`` bytes of each row; ``EVEN``: it divides the row.
    """
    tile_token = tl.program_id(0)
    tile_out = tl.program_id(1)
    part = tl.program_id(2)
    out = tile_out * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = tl.minimum(out, out_features - 1).to(tl.int64)
    token = tile_token * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    present = token < tokens
    x_row = tl.minimum(token, tokens - 1).to(tl.int64)
    steps = tl.cdiv(in_features * BITS // 8, BLOCK_BYTES)
    total = tl.zeros([BLOCK_OUT, BLOCK_TOKENS], tl.float32)
    for step in tl.range(part * steps // SPLIT, (part + 1) * steps // SPLIT, num_stages=STAGES):
        # A step is summed apart, so that the tensor cores are done with the weights' registers when it ends:
        # Triton 3.6 lets the next step overwrite them under an asynchronous product that reads them. Two
        # products make its sum, since the compiler would make one of a single one and the total again.
        if BITS == 4:
            packed, low_multiplier, high_multiplier, x_low, x_high = read_step(
                x_pointer,
                codes_pointer,
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
            low, high = float_nibbles(packed, low_multiplier, high_multiplier, x_low.dtype, GROUP, PTX)
            summed = tl.dot(low, x_low.to(low.dtype))
            total += tl.dot(high, x_high.to(high.dtype), summed)
        else:
            HALF_STEP: tl.constexpr = BLOCK_BYTES // 2
            first = step * BLOCK_BYTES
            codes0, x0 = _read_bytes(
                x_pointer, codes_pointer, x_row, present, row, first, in_features, HALF_STEP, EVEN
            )
            codes1, x1 = _read_bytes(
                x_pointer, codes_pointer, x_row, present, row, first + HALF_STEP, in_features, HALF_STEP, EVEN
            )
            weight0 = float_bytes(codes0, x0.dtype, PTX)
            weight1 = float_bytes(codes1, x1.dtype, PTX)
            summed = tl.dot(weight0, x0.to(weight0.dtype))
            total += tl.dot(weight1, x1.to(weight1.dtype), summed)
    finished = True
    if SPLIT > 1:
        tile = tile_out * tl.num_programs(0) + tile_token
        finished, total = add_parts(
            total, partial_pointer, counter_pointer, tile, part, BLOCK_TOKENS, BLOCK_OUT, SPLIT
        )
    if finished:
        y = total * tl.load(weight_scale_pointer + row)[:, None]
        if HAS_BIAS:
            y += tl.load(bias_pointer + row).to(tl.float32)[:, None]
        offset = token.to(tl.int64)[None, :] * out_features + out[:, None]
        mask = present[None, :] & (out < out_features)[:, None]
        tl.store(out_pointer + offset, y.to(out_pointer.dtype.element_ty), mask=mask)


def prepared_float_gemm(
    plan: FusedPlan,
    codes: Tensor,
    weight_scale: Tensor,
    multiplier: Tensor | None,
    bias: Tensor | None,
    leading: tuple[int, ...],
) -> Callable[..., Tensor]:
    """For one weight, a function of ``x`` (and ``out``, if it is there) to ``out``.

    ``y_tn = w_n Σ_k x_tk weight_nk + b_n`` of ``x`` ``[*leading, in]`` in float16 or bfloat16; ``out`` is
    ``[*leading, out_features]``, by default in the dtype of ``x``.

    Args:
        plan: tile sizes; of packed codes ``block_bytes`` is a multiple of half a packing block.
        codes: packed uint8 ``[out, in/2]``, of rows that :func:`.supports_words`; or int8 ``[out, in]`` with
            ``in`` a multiple of 16.
        weight_scale: float32 ``[out]``.
        multiplier: uint8 ``[out, in/group]`` of packed codes, or None.
        bias: ``[out]`` or None.
        leading: sizes of tokens, one or more.
    """
    (out_features, row_bytes), device, tokens = codes.shape, codes.device, math.prod(leading)
    bits = 8 if codes.dtype == torch.int8 else 4
    in_features, shape = row_bytes * 8 // bits, (*leading, out_features)
    tiles = Tiles.of(plan, tokens, out_features, row_bytes)
    kernel, split = _float_gemm_kernel[tiles.grid], tiles.grid[2]
    multipliers, group_size = (
        codes if multiplier is None else multiplier,
        group_size_of(in_features, multiplier),
    )
    biases, has_bias = (weight_scale, False) if bias is None else (bias, True)
    half = pack_block(in_features) // 2 if bits == 4 else 0
    even = row_bytes % plan.block_bytes == 0
    block_tokens, block_out, block_bytes = plan.block_tokens, plan.block_out, plan.block_bytes
    warps, stages = plan.warps, plan.stages

    def run(x: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = torch.empty(*shape, dtype=x.dtype, device=device)
        partial, meeting = tiles.room(torch.float32, weight_scale)
        kernel(
            x.contiguous(),
            codes,
            multipliers,
            weight_scale,
            biases,
            out,
            partial,
            meeting,
            tokens,
            out_features,
            in_features,
            bits,
            half,
            group_size,
            has_bias,
            block_tokens,
            block_out,
            block_bytes,
            split,
            stages,
            even,
            COMPILED,
            enable_fp_fusion=True,
            num_warps=warps,
            num_stages=stages,
        )
        return out

    return run
