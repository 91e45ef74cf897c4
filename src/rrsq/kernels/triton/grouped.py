"""The products of a mixture of experts; launching those of integers."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..packing import chunk_words, pack_block
from ..routing import Routing
from .device import compiled
from .gemv_kernel import ROWS
from .grouped_float import launch_float
from .grouped_kernel import grouped_gemm_kernel, grouped_gemv_kernel
from .grouped_plans import float_plan, integer_plan
from .plans import FusedPlan, GemvPlan
from .workspace import split_sums

__all__ = ["grouped_linear", "launch_grouped"]


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
    unpacked: Tensor | None,
) -> Tensor:
    """See :func:`rrsq.kernels.grouped_linear`."""
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
        launch_grouped(integer_plan(*sizes), operand, scale, routing, rows_per_token, *weight, out)
    return out


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
    split, partial, meeting = split_sums(plan, blocks * tiles_out, packed.shape[2], torch.int32, scale)
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
