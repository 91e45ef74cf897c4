"""Launching the products of a mixture of experts whose sums are floats."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..packing import pack_block
from ..routing import Routing
from .device import compiled
from .grouped_float_kernel import grouped_float_kernel
from .plans import FusedPlan
from .workspace import split_sums

__all__ = ["launch_float"]


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
    tiles_out = triton.cdiv(out_features, plan.block_out)
    split, partial, meeting = split_sums(plan, blocks * tiles_out, row_bytes, torch.float32, weight_scale)
    grouped_float_kernel[(blocks, tiles_out, split)](
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
        SPLIT=split,
        STAGES=plan.stages,
        EVEN=row_bytes % plan.block_bytes == 0,
        PTX=compiled(),
        enable_fp_fusion=True,
        num_warps=plan.warps,
        num_stages=plan.stages,
    )
