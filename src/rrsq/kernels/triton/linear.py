"""The linears on Triton kernels."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..packing import dequantize, supports_words, weight_operand
from .group_scaled_kernel import group_scaled_kernel
from .launch import launch
from .tuning import plan_for

__all__ = ["linear_folded", "linear_group_scaled", "linear_weight_only"]


def linear_folded(
    operand: Tensor,
    scale: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_multiplier: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    unpacked: Tensor | None,
) -> Tensor:
    """See :func:`rrsq.kernels.linear_folded`."""
    tokens, in_features = operand.shape
    out_features = weight_packed.shape[0]
    out = torch.empty(tokens, out_features, dtype=out_dtype, device=operand.device)
    if tokens:
        group_size = 0 if weight_multiplier is None else in_features // weight_multiplier.shape[1]
        packed_words = supports_words(in_features, group_size)
        plan = plan_for(tokens, out_features, in_features, packed_words, operand.device)
        launch(
            plan,
            operand.contiguous(),
            scale,
            weight_packed,
            weight_scale,
            weight_multiplier,
            bias,
            out,
            unpacked,
        )
    return out


def linear_group_scaled(
    codes: Tensor,
    scale: Tensor,
    group_scale: Tensor,
    tokens_per_set: int,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_multiplier: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    unpacked: Tensor | None,
) -> Tensor:
    """See :func:`rrsq.kernels.linear_group_scaled`."""
    tokens, in_features = codes.shape
    out_features = weight_packed.shape[0]
    out = torch.empty(tokens, out_features, dtype=out_dtype, device=codes.device)
    if tokens == 0:
        return out
    weight = weight_operand(weight_packed, weight_multiplier) if unpacked is None else unpacked
    block_tokens, block_out, warps = (
        (128, 128, 8) if tokens > 64 else (64, 64, 4) if tokens > 16 else (16, 64, 4)
    )
    group_scaled_kernel[(triton.cdiv(tokens, block_tokens), triton.cdiv(out_features, block_out))](
        codes.contiguous(),
        scale,
        group_scale.contiguous(),
        weight,
        weight_scale,
        weight_scale if bias is None else bias,
        out,
        tokens,
        tokens_per_set,
        out_features,
        in_features,
        HAS_BIAS=bias is not None,
        GROUP=in_features // group_scale.shape[1],
        BLOCK_TOKENS=block_tokens,
        BLOCK_OUT=block_out,
        num_warps=warps,
        num_stages=3,
    )
    return out


def linear_weight_only(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_multiplier: Tensor | None,
    bias: Tensor | None,
    unpacked: Tensor | None,
) -> Tensor:
    """See :func:`rrsq.kernels.linear_weight_only`: a dequantization pass, then the library's product."""
    weight = dequantize(weight_packed, weight_multiplier, weight_scale, x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
