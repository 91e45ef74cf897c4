"""Launching the kernels with a given plan: grids, strides, alignment.

Without ``enable_fp_fusion`` a product and a sum are rounded one after the other, as in the reference, so that
the results are the reference's to the bit.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..packing import chunk_words, group_size_of, pack_block, weight_operand
from .device import compiled
from .gemv_kernel import ROWS, gemv_kernel
from .int8_gemm_kernel import int8_gemm_descriptor_kernel, int8_gemm_kernel
from .packed_gemm_kernel import packed_gemm_kernel
from .plans import FusedPlan, GemvPlan, Plan, TwoPassPlan
from .workspace import split_sums

__all__ = ["int8_gemm", "launch"]


def launch(
    plan: Plan,
    operand: Tensor,
    scale: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    multiplier: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    unpacked: Tensor | None = None,
) -> None:
    """Compute ``out`` ``[tokens, out_features]`` of :func:`rrsq.kernels.linear_folded` by ``plan``."""
    if isinstance(plan, TwoPassPlan):
        weight = weight_operand(packed, multiplier) if unpacked is None else unpacked
        int8_gemm(plan, operand, scale, weight, weight_scale, bias, out)
    elif isinstance(plan, GemvPlan):
        _gemv(plan, operand, scale, packed, weight_scale, multiplier, bias, out)
    else:
        _fused(plan, operand, scale, packed, weight_scale, multiplier, bias, out)


def _gemv(
    plan: GemvPlan,
    operand: Tensor,
    scale: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    multiplier: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    in_features = operand.shape[1]
    out_features = packed.shape[0]
    group_size = group_size_of(in_features, multiplier)
    gemv_kernel[(triton.cdiv(out_features, ROWS),)](
        operand.view(torch.int32),
        scale,
        packed.view(torch.int32),
        packed if multiplier is None else multiplier,
        weight_scale,
        weight_scale if bias is None else bias,
        out,
        out_features,
        in_features,
        HALF=pack_block(in_features) // 2,
        GROUP=group_size,
        HAS_BIAS=bias is not None,
        CHUNKS=plan.chunks,
        CHUNK_WORDS=chunk_words(group_size),
        PTX=compiled(),
        enable_fp_fusion=False,
        num_warps=plan.warps,
    )


def _fused(
    plan: FusedPlan,
    operand: Tensor,
    scale: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    multiplier: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    tokens, in_features = operand.shape
    out_features, row_bytes = packed.shape
    tiles_token, tiles_out = triton.cdiv(tokens, plan.block_tokens), triton.cdiv(out_features, plan.block_out)
    split, partial, meeting = split_sums(plan, tiles_token * tiles_out, row_bytes, torch.int32, scale)
    packed_gemm_kernel[(tiles_token, tiles_out, split)](
        operand,
        scale,
        packed,
        packed if multiplier is None else multiplier,
        weight_scale,
        weight_scale if bias is None else bias,
        out,
        partial,
        meeting,
        tokens,
        out_features,
        in_features,
        HALF=pack_block(in_features) // 2,
        GROUP=group_size_of(in_features, multiplier),
        HAS_BIAS=bias is not None,
        BLOCK_TOKENS=plan.block_tokens,
        BLOCK_OUT=plan.block_out,
        BLOCK_BYTES=plan.block_bytes,
        SPLIT=split,
        STAGES=plan.stages,
        EVEN=row_bytes % plan.block_bytes == 0,
        FULL=tokens % plan.block_tokens == 0,
        PTX=compiled(),
        enable_fp_fusion=False,
        num_warps=plan.warps,
        num_stages=plan.stages,
    )


def int8_gemm(
    plan: TwoPassPlan,
    operand: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """``out = scale ⊗ weight_scale ⊙ (operand @ weight.T) + bias`` of int8 operand and weight."""
    tokens, in_features = operand.shape
    out_features = weight.shape[0]
    tiles = triton.cdiv(tokens, plan.block_tokens) * triton.cdiv(out_features, plan.block_out)
    bias_argument = weight_scale if bias is None else bias
    if plan.descriptors and _describable(operand, weight, out):
        from triton.tools.tensor_descriptor import TensorDescriptor

        int8_gemm_descriptor_kernel[(tiles,)](
            TensorDescriptor.from_tensor(operand, [plan.block_tokens, plan.block_in]),
            scale,
            TensorDescriptor.from_tensor(weight, [plan.block_out, plan.block_in]),
            weight_scale,
            bias_argument,
            TensorDescriptor.from_tensor(out, [plan.block_tokens, plan.block_out]),
            tokens,
            out_features,
            in_features,
            HAS_BIAS=bias is not None,
            BLOCK_TOKENS=plan.block_tokens,
            BLOCK_OUT=plan.block_out,
            BLOCK_IN=plan.block_in,
            GROUP_TILES=plan.group_tiles,
            enable_fp_fusion=False,
            num_warps=plan.warps,
            num_stages=plan.stages,
        )
    else:
        int8_gemm_kernel[(tiles,)](
            operand,
            scale,
            weight,
            weight_scale,
            bias_argument,
            out,
            tokens,
            out_features,
            in_features,
            HAS_BIAS=bias is not None,
            BLOCK_TOKENS=plan.block_tokens,
            BLOCK_OUT=plan.block_out,
            BLOCK_IN=plan.block_in,
            GROUP_TILES=plan.group_tiles,
            EVEN=in_features % plan.block_in == 0,
            enable_fp_fusion=False,
            num_warps=plan.warps,
            num_stages=plan.stages,
        )


def _describable(*tensors: Tensor) -> bool:
    """Whether the tensor memory accelerator can address them: 16-byte aligned bases and rows."""
    return all(
        tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.element_size() % 16 == 0
        for tensor in tensors
    )
