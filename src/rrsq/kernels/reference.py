"""The eager reference behind the signatures of the public operations."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops, packing
from .eager import activation, hadamard, linear, rotation

__all__ = [
    "grouped_linear",
    "hadamard_transform",
    "linear_folded",
    "linear_group_scaled",
    "linear_weight_only",
    "quantize_folded",
    "quantize_smoothed",
]


def hadamard_transform(x: Tensor, base: Tensor, hadamard_block: int, inner: int) -> Tensor:
    """See :func:`rrsq.kernels.hadamard_transform`."""
    if inner == 1:
        return hadamard.hadamard_transform(x, base, hadamard_block)
    mixed = x.unflatten(-1, (-1, hadamard_block, inner)).transpose(-1, -2)
    rotated = hadamard.hadamard_transform(mixed, base, hadamard_block)
    return rotated.transpose(-1, -2).reshape(x.shape)


def quantize_folded(
    x: Tensor,
    bits: int,
    group_size: int | None,
    clip: float,
    base: Tensor | None,
    hadamard_block: int,
    hadamard_inner: int,
) -> tuple[Tensor, Tensor]:
    """See :func:`rrsq.kernels.quantize_folded`."""
    if base is not None:
        x = rotation.rotate_reproducibly(x, base, hadamard_block, hadamard_inner)
    return activation.quantize_folded(x, bits, group_size, clip)


def quantize_smoothed(
    x: Tensor,
    bits: int,
    group_size: int,
    scope: str,
    statistic: str,
    clip: float,
    channel_order: Tensor | None,
    base: Tensor | None,
    hadamard_block: int,
    hadamard_inner: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`rrsq.kernels.quantize_smoothed`."""
    if base is not None:
        x = hadamard_transform(x, base, hadamard_block, hadamard_inner)
    return activation.quantize_smoothed(x, bits, group_size, scope, statistic, clip, channel_order)


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
    weight = packing.weight_operand(weight_packed, weight_multiplier) if unpacked is None else unpacked
    return linear.linear_folded(operand, scale, weight, weight_scale, bias, out_dtype)


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
    weight = packing.weight_operand(weight_packed, weight_multiplier) if unpacked is None else unpacked
    return linear.linear_group_scaled(
        codes, scale, group_scale, tokens_per_set, weight, weight_scale, bias, out_dtype
    )


def linear_weight_only(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_multiplier: Tensor | None,
    bias: Tensor | None,
    unpacked: Tensor | None,
) -> Tensor:
    """See :func:`rrsq.kernels.linear_weight_only`."""
    if unpacked is None:
        return linear.linear_weight_only(x, weight_packed, weight_multiplier, weight_scale, bias)
    weight = (unpacked.to(torch.float32) * weight_scale.unsqueeze(1)).to(x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


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
    """See :func:`rrsq.kernels.grouped_linear`: a loop over the experts that have rows.

    Each expert's product is the operation that it would be as a linear of its own, by the best kernel for it.
    """
    out = torch.empty(experts.shape[0], weight_packed.shape[1], dtype=out_dtype, device=operand.device)
    for expert in experts.unique().tolist():
        rows = (experts == expert).nonzero().squeeze(1)
        tokens = rows // rows_per_token
        x = operand[tokens]
        weight = (
            weight_packed[expert],
            weight_scale[expert],
            None if weight_multiplier is None else weight_multiplier[expert],
        )
        whole = None if unpacked is None else unpacked[expert]
        if scale is None:
            y = ops.linear_weight_only(x, *weight, None, whole).to(out_dtype)
        elif group_scale is None:
            y = ops.linear_folded(x, scale[tokens], *weight, None, out_dtype, whole)
        else:
            per_token = group_scale[tokens // tokens_per_set]
            packed, rows_scale, multiplier = weight
            y = ops.linear_group_scaled(
                x, scale[tokens], per_token, 1, packed, rows_scale, None, out_dtype, multiplier, whole
            )
        out[rows] = y
    return out
