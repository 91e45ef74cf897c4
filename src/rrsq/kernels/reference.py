"""The eager reference behind the signatures of the public operations."""

from __future__ import annotations

import torch
from torch import Tensor

from .eager import activation, hadamard, linear, packing, rotation

__all__ = [
    "hadamard_transform",
    "linear_folded",
    "linear_group_scaled",
    "linear_weight_only",
    "quantize_folded",
    "quantize_smoothed",
    "weight_operand",
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


def weight_operand(packed: Tensor, multiplier: Tensor | None) -> Tensor:
    """See :func:`rrsq.kernels.weight_operand`."""
    return packing.weight_operand(packed, multiplier)


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
