"""Launching the activation kernels."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from ..eager.activation import FOLD_MAX, TINY, code_max, tokens_per_set
from .device import processors
from .quantize_kernel import quantize_folded_kernel, quantize_smoothed_kernel, smoothing_statistic_kernel
from .rotation_factors import rotation_factors
from .rotation_kernel import rotation_kernel
from .rotation_shape import rotation_shape

__all__ = ["hadamard_transform", "quantize_folded", "quantize_smoothed"]

_WHOLE_ROW = 16384


def _rotate(
    x: Tensor,
    base: Tensor,
    hadamard_block: int,
    inner: int,
    out: Tensor,
    scale: Tensor,
    factors: tuple[float, float],
    code_limit: int,
    group_size: int,
    quantize: bool,
) -> None:
    shape = rotation_shape(x.shape[1], base.shape[0], hadamard_block, inner)
    split = shape.split
    exact = not quantize and x.dtype == torch.float32
    dense, fast = rotation_factors(base, shape, torch.float32 if exact else torch.float16)
    tokens = x.shape[0]
    limit = {} if shape.registers is None else {"maxnreg": shape.registers}
    rotation_kernel[(min(tokens, shape.programs * processors(x.device)),)](
        x,
        dense,
        fast,
        out,
        scale,
        tokens,
        factors[0],
        factors[1],
        1.0 / math.sqrt(hadamard_block),
        CHANNELS=x.shape[1],
        DENSE=split.dense,
        DENSE_PADDED=shape.dense_padded,
        DENSE_STEP=shape.dense_step,
        FAST=split.fast,
        MIX_FAST=split.mix_fast,
        CODE_MAX=code_limit,
        GROUP=group_size,
        QUANTIZE=quantize,
        EXACT=exact,
        STAGES=shape.stages,
        num_warps=shape.warps,
        enable_fp_fusion=False,
        **limit,
    )


def hadamard_transform(x: Tensor, base: Tensor, hadamard_block: int, inner: int) -> Tensor:
    """See :func:`rrsq.kernels.hadamard_transform`."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty(rows.shape, dtype=torch.float32, device=x.device)
    if rows.shape[0]:
        _rotate(rows, base, hadamard_block, inner, out, out, (0.0, 0.0), 0, 0, False)
    return out.view(x.shape)


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
    tokens, channels = x.shape
    x = x.contiguous()
    operand = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=x.device)
    if tokens == 0:
        return operand, scale
    limit = code_max(bits)
    factors = (clip / limit if group_size is None else clip / (limit * FOLD_MAX), clip / limit)
    if base is not None:
        rotation = (base, hadamard_block, hadamard_inner)
        _rotate(x, *rotation, operand, scale, factors, limit, group_size or 0, True)
        return operand, scale
    block = max(triton.next_power_of_2(channels), 64)
    if block > _WHOLE_ROW:
        block = _WHOLE_ROW // 4
    quantize_folded_kernel[(tokens,)](
        x,
        operand,
        scale,
        channels,
        factors[0],
        factors[1],
        CODE_MAX=limit,
        GROUP=group_size or 0,
        BLOCK=block,
        BLOCKS=triton.cdiv(channels, block),
        enable_fp_fusion=False,
        num_warps=min(max(block // 1024, 1), 16),
    )
    return operand, scale


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
    """See :func:`rrsq.kernels.quantize_smoothed`. A rotation is a pass of its own here."""
    x = x.contiguous() if base is None else hadamard_transform(x, base, hadamard_block, hadamard_inner)
    tokens, channels = x.shape
    groups = channels // group_size
    set_size = tokens_per_set(scope, tokens)
    sets = -(-tokens // set_size)
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=x.device)
    group_scale = torch.full((sets, groups), TINY, dtype=torch.float32, device=x.device)
    if tokens == 0:
        return codes, scale, group_scale
    order = x if channel_order is None else channel_order
    limit = code_max(bits)
    padded_groups = triton.next_power_of_2(groups)
    warps = min(max(padded_groups * group_size // 1024, 1), 16)
    normalize = statistic == "token_normalized_max"
    if scope != "token":
        smoothing_statistic_kernel[(tokens,)](
            x,
            order,
            group_scale.view(torch.int32),
            channels,
            set_size,
            HAS_ORDER=channel_order is not None,
            NORMALIZE=normalize,
            GROUP=group_size,
            GROUPS=padded_groups,
            num_warps=warps,
        )
    quantize_smoothed_kernel[(tokens,)](
        x,
        order,
        codes,
        scale,
        group_scale,
        channels,
        set_size,
        clip / limit,
        CODE_MAX=limit,
        HAS_ORDER=channel_order is not None,
        NORMALIZE=normalize,
        TOKEN_SCOPE=scope == "token",
        GROUP=group_size,
        GROUPS=padded_groups,
        num_warps=warps,
    )
    return codes, scale, group_scale
