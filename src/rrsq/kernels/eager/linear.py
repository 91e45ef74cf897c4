"""The quantized matrix products, with exact integer accumulation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packing import weight_operand

__all__ = ["int8_matmul", "linear_folded", "linear_group_scaled", "linear_weight_only"]


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T`` of int8 ``[m, k]`` and ``[n, k]`` in int32 ``[m, n]``, exact.

    CUDA's ``torch._int_mm`` wants at least 17 rows and multiples of 8 elsewhere: zeros pad what is short.
    """
    if a.device.type != "cuda":
        return torch._int_mm(a, b.t())
    m, k = a.shape
    n = b.shape[0]
    pad_m, pad_n, pad_k = max(0, 17 - m), -n % 8, -k % 8
    if pad_m or pad_n or pad_k:
        a = torch.nn.functional.pad(a, (0, pad_k, 0, pad_m))
        b = torch.nn.functional.pad(b, (0, pad_k, 0, pad_n))
    return torch._int_mm(a, b.t())[:m, :n]


def linear_folded(
    operand: Tensor,
    scale: Tensor,
    weight_operand: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """``y_in = a_i w_n Σ_k operand_ik weight_nk + b_n``: one int32 accumulation and a rank-1 epilogue.

    Args:
        operand: int8 ``[tokens, in]``.
        scale: float32 ``[tokens]``.
        weight_operand: int8 ``[out, in]`` from :func:`~rrsq.kernels.packing.weight_operand`.
        weight_scale: float32 ``[out]``.
        bias: ``[out]`` or None.
        out_dtype: dtype of the result.

    Returns:
        ``[tokens, out]``.
    """
    y = int8_matmul(operand, weight_operand).float() * scale.unsqueeze(1) * weight_scale
    return (y if bias is None else y + bias.float()).to(out_dtype)


def linear_group_scaled(
    codes: Tensor,
    scale: Tensor,
    group_scale: Tensor,
    tokens_per_set: int,
    weight_operand: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """``y_in = a_i w_n Σ_g s_g Σ_{k in g} code_ik weight_nk + b_n``: the paper's fused product (section 4).

    Each group is accumulated exactly in int32, then rescaled and added in float32.

    Args:
        codes: int8 ``[tokens, in]``.
        scale: float32 ``[tokens]``.
        group_scale: float32 ``[sets, groups]``; token ``i`` belongs to set ``i // tokens_per_set``.
        tokens_per_set: tokens that share a row of ``group_scale``.
        weight_operand: int8 ``[out, in]``, its columns in the channel order of ``codes``.
        weight_scale: float32 ``[out]``.
        bias: ``[out]`` or None.
        out_dtype: dtype of the result.
    """
    tokens, channels = codes.shape
    groups = group_scale.shape[1]
    size = channels // groups
    per_token = group_scale.repeat_interleave(tokens_per_set, 0)[:tokens]
    y = torch.zeros(tokens, weight_operand.shape[0], dtype=torch.float32, device=codes.device)
    for g in range(groups):
        columns = slice(g * size, (g + 1) * size)
        part = int8_matmul(codes[:, columns].contiguous(), weight_operand[:, columns].contiguous())
        y.addcmul_(part.float(), per_token[:, g : g + 1])
    y *= scale.unsqueeze(1) * weight_scale
    return (y if bias is None else y + bias.float()).to(out_dtype)


def linear_weight_only(
    x: Tensor, packed: Tensor, multiplier: Tensor | None, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """16-bit activations: the weight is dequantized to the dtype of ``x`` and multiplied in floating point.

    Args:
        x: ``[tokens, in]`` floating point.
        packed: uint8 ``[out, in/2]``.
        multiplier: uint8 ``[out, in/group]`` or None.
        weight_scale: float32 ``[out]``.
        bias: ``[out]`` or None.
    """
    weight = weight_operand(packed, multiplier).to(torch.float32) * weight_scale.unsqueeze(1)
    return torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
