"""Launching the kernels with a given plan: grids, strides, alignment.

Without ``enable_fp_fusion`` a product and a sum are rounded one after the other, as in the reference, so that
the results are the reference's to the bit.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..eager.packing import pack_block
from .device import compiled
from .gemv_kernel import ROWS, gemv_kernel
from .int8_gemm_kernel import int8_gemm_descriptor_kernel, int8_gemm_kernel
from .packed_gemm_kernel import packed_gemm_kernel
from .plans import FusedPlan, GemvPlan, Plan, TwoPassPlan
from .unpack_kernel import unpack_kernel, unpack_words_kernel
from .workspace import split_sums

__all__ = ["chunk_words", "dequantize", "int8_gemm", "launch", "supports_words", "unpack"]


def _group_size(in_features: int, multiplier: Tensor | None) -> int:
    return 0 if multiplier is None else in_features // multiplier.shape[1]


def supports_words(in_features: int, group_size: int) -> bool:
    """Whether rows split into 32-bit words that share a multiplier (``group_size`` 0: no multipliers)."""
    return in_features % 64 == 0 and (
        group_size == 0 or (group_size >= 16 and group_size & (group_size - 1) == 0)
    )


def chunk_words(group_size: int) -> int:
    return 4 if group_size == 16 else 8


def unpack(packed: Tensor, multiplier: Tensor | None) -> Tensor:
    """The int8 operand ``[out, in]`` of a packed weight."""
    out_features, row_bytes = packed.shape
    in_features = 2 * row_bytes
    group_size = _group_size(in_features, multiplier)
    out = torch.empty(out_features, in_features, dtype=torch.int8, device=packed.device)
    half = pack_block(in_features) // 2
    if supports_words(in_features, group_size):
        words = chunk_words(group_size)
        rows, chunks = 4, 256 // words
        grid = (triton.cdiv(out_features, rows), triton.cdiv(in_features // 8, chunks * words))
        unpack_words_kernel[grid](
            packed.view(torch.int32),
            packed if multiplier is None else multiplier,
            out.view(torch.int32),
            out_features,
            in_features,
            HALF=half,
            GROUP=group_size,
            CHUNK_WORDS=words,
            BLOCK_ROWS=rows,
            CHUNKS=chunks,
            num_warps=4,
        )
    else:
        _unpack_any(packed, multiplier, None, out)
    return out


def dequantize(packed: Tensor, multiplier: Tensor | None, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight ``[out, in]`` in floating point."""
    out = torch.empty(packed.shape[0], 2 * packed.shape[1], dtype=dtype, device=packed.device)
    _unpack_any(packed, multiplier, weight_scale, out)
    return out


def _unpack_any(packed: Tensor, multiplier: Tensor | None, weight_scale: Tensor | None, out: Tensor) -> None:
    rows, row_bytes = packed.shape
    grid = (rows, triton.cdiv(row_bytes, 1024))
    unpack_kernel[grid](
        packed,
        packed if multiplier is None else multiplier,
        packed if weight_scale is None else weight_scale,
        out,
        rows,
        row_bytes,
        HALF=pack_block(2 * row_bytes) // 2,
        GROUP=_group_size(2 * row_bytes, multiplier),
        DEQUANTIZE=weight_scale is not None,
        BLOCK_ROWS=1,
        BLOCK_BYTES=1024,
        num_warps=4,
    )


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
        weight = unpack(packed, multiplier) if unpacked is None else unpacked
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
    group_size = _group_size(in_features, multiplier)
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
        GROUP=_group_size(in_features, multiplier),
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
