"""Shapes and dtypes of the results, for tracing: what ``torch.compile`` calls in place of a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from .eager.activation import tokens_per_set

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
    return torch.empty_like(x, dtype=torch.promote_types(x.dtype, torch.float32))


def quantize_folded(
    x: Tensor,
    bits: int,
    group_size: int | None,
    clip: float,
    base: Tensor | None,
    hadamard_block: int,
    hadamard_inner: int,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


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
    tokens, channels = x.shape
    size = 1 if scope == "token" else tokens_per_set(scope, tokens)
    sets = 1 if scope == "sequence" else -(-tokens // size)
    codes, scale = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(tokens, dtype=torch.float32)
    return codes, scale, x.new_empty((sets, channels // group_size), dtype=torch.float32)


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
    return operand.new_empty((operand.shape[0], weight_packed.shape[0]), dtype=out_dtype)


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
    return codes.new_empty((codes.shape[0], weight_packed.shape[0]), dtype=out_dtype)


def linear_weight_only(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_multiplier: Tensor | None,
    bias: Tensor | None,
    unpacked: Tensor | None,
) -> Tensor:
    return x.new_empty((x.shape[0], weight_packed.shape[0]))


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
    return operand.new_empty((experts.shape[0], weight_packed.shape[1]), dtype=out_dtype)
