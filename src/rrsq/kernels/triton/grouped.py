"""Launching the products of a mixture of experts."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..eager.packing import pack_block
from ..routing import Routing
from .device import compiled
from .gemv_kernel import ROWS
from .grouped_kernel import grouped_gemm_kernel, grouped_gemv_kernel
from .launch import chunk_words
from .plans import FusedPlan, GemvPlan
from .workspace import MAXIMUM_COUNTERS, counters

__all__ = ["grouped_linear", "grouped_plan", "launch_grouped"]

_GEMV = GemvPlan(chunks=32, warps=2)
# Tiles that keep every multiprocessor of a large GPU busy while another one's loads are on their way.
_ENOUGH_TILES = 512


def grouped_linear(
    operand: Tensor,
    scale: Tensor,
    group_scale: None,
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
    """See :func:`rrsq.kernels.grouped_linear`; integer-folded operands only."""
    num_experts, out_features, row_bytes = weight_packed.shape
    out = torch.empty(experts.shape[0], out_features, dtype=out_dtype, device=operand.device)
    if experts.shape[0]:
        routing = Routing(experts, order, start, ends, blocks, block_rows)
        likely = min(experts.shape[0], num_experts)
        launch_grouped(
            grouped_plan(block_rows, likely, out_features, row_bytes),
            operand.contiguous(),
            scale,
            routing,
            rows_per_token,
            weight_packed,
            weight_scale,
            weight_multiplier,
            out,
        )
    return out


def grouped_plan(block_rows: int, likely: int, out_features: int, row_bytes: int) -> GemvPlan | FusedPlan:
    """The plan for blocks of ``block_rows`` rows, of which ``likely`` will be needed or more.

    All need less than 100 KiB of shared memory. K is split where the output alone has too few tiles.
    """
    if block_rows == 1:
        return _GEMV
    if block_rows == 128:
        return FusedPlan(128, 128, 64, 1, 4, 3)
    split = 1
    while likely * triton.cdiv(out_features, 64) * split < _ENOUGH_TILES and 512 * split <= row_bytes:
        split *= 2
    return FusedPlan(block_rows, 64, 128, split, 4, 4 if block_rows == 16 else 3)


def launch_grouped(
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
        grouped_gemv_kernel[(triton.cdiv(out_features, ROWS), out.shape[0])](
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
            PTX=compiled(),
            enable_fp_fusion=False,
            num_warps=plan.warps,
        )
        return
    blocks = routing.blocks.shape[0]
    tiles_out = triton.cdiv(out_features, plan.block_out)
    split = min(plan.split, triton.cdiv(packed.shape[2], plan.block_bytes))
    split = split if blocks * tiles_out <= MAXIMUM_COUNTERS else 1
    partial = meeting = scale
    if split > 1:
        size = blocks * tiles_out * split * plan.block_out * plan.block_tokens
        partial = torch.empty(size, dtype=torch.int32, device=operand.device)
        meeting = counters(blocks * tiles_out, operand.device)
    grouped_gemm_kernel[(blocks, tiles_out, split)](
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
        SPLIT=split,
        STAGES=plan.stages,
        EVEN=packed.shape[2] % plan.block_bytes == 0,
        PTX=compiled(),
        enable_fp_fusion=False,
        num_warps=plan.warps,
        num_stages=plan.stages,
    )
