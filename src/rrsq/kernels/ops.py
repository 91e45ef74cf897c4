"""The operations of a quantized linear, as functions; :mod:`.library` has what runs them."""

from __future__ import annotations

import torch
from torch import Tensor

from . import library  # noqa: F401  (defines torch.ops.rrsq)
from .routing import Routing

__all__ = [
    "grouped_linear",
    "hadamard_transform",
    "linear_folded",
    "linear_group_scaled",
    "linear_weight_only",
    "quantize_folded",
    "quantize_smoothed",
]


def hadamard_transform(x: Tensor, base: Tensor, hadamard_block: int, inner: int = 1) -> Tensor:
    """Rotate blocks of channels online: ``x @ R``, ``R`` orthonormal (QuaRot, arXiv 2404.00456, section 4).

    Each run of ``hadamard_block * inner`` channels is seen as ``[hadamard_block, inner]`` and mixed over its
    first index by ``kron(base, sylvester) / sqrt(hadamard_block)``; so ``R = kron(H, I_inner)`` in each run.
    ``inner`` is 1 for an ordinary rotation; the rotation across heads of ``o_proj``'s input has
    ``hadamard_block = heads`` and ``inner = head_dim``.

    Args:
        x: floating point ``[..., channels]``; ``channels`` is a multiple of ``hadamard_block * inner``.
        base: ``[k, k]`` of ±1, any dtype; ``hadamard_block / k`` is a power of two.
        hadamard_block: order of the Hadamard matrix.
        inner: channels between neighbours that are mixed.

    Returns:
        A tensor like ``x``, in float32 if ``x`` is of lower precision.
    """
    return torch.ops.rrsq.hadamard_transform(x, base, hadamard_block, inner)


def quantize_folded(
    x: Tensor,
    bits: int,
    group_size: int | None,
    clip: float,
    base: Tensor | None = None,
    hadamard_block: int = 0,
    hadamard_inner: int = 1,
) -> tuple[Tensor, Tensor]:
    """Rotate (where ``base`` is given) and quantize each token, with integer-folded group scales.

    The arithmetic is that of :func:`rrsq.kernels.eager.activation.quantize_folded` on the rotated
    activations; on a GPU it is one pass that reads ``x`` and writes the operand.

    Args:
        x: floating point ``[tokens, channels]``.
        bits: 4 or 8; groups need 4.
        group_size: channels a multiplier covers, or None for one scale a token.
        clip: fraction of the largest magnitude that the largest code stands for, in (0, 1].
        base: ``[k, k]`` of ±1 (see :func:`hadamard_transform`), or None for no rotation.
        hadamard_block: order of the rotation; 0 without one.
        hadamard_inner: see ``inner`` of :func:`hadamard_transform`.

    Returns:
        ``operand`` int8 ``[tokens, channels]`` and ``scale`` float32 ``[tokens]``.
    """
    return torch.ops.rrsq.quantize_folded(x, bits, group_size, clip, base, hadamard_block, hadamard_inner)


def quantize_smoothed(
    x: Tensor,
    bits: int,
    group_size: int,
    scope: str,
    statistic: str,
    clip: float,
    channel_order: Tensor | None = None,
    base: Tensor | None = None,
    hadamard_block: int = 0,
    hadamard_inner: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate (where ``base`` is given), smooth by real group scales and quantize each token.

    The arithmetic is that of :func:`rrsq.kernels.eager.activation.quantize_smoothed` (arXiv 2409.20361,
    section 4) on the rotated activations.

    Args:
        x: floating point ``[tokens, channels]``.
        bits: 4 or 8.
        group_size: channels a smoothing scale covers; divides ``channels``.
        scope: ``sequence``, ``block`` or ``token``.
        statistic: ``max`` or ``token_normalized_max``.
        clip: fraction of the token's largest smoothed magnitude that the largest code stands for.
        channel_order: int32 ``[channels]`` permutation applied after the rotation, or None.
        base: ``[k, k]`` of ±1 (see :func:`hadamard_transform`), or None for no rotation.
        hadamard_block: order of the rotation; 0 without one.
        hadamard_inner: see ``inner`` of :func:`hadamard_transform`.

    Returns:
        ``codes`` int8 ``[tokens, channels]``, ``scale`` float32 ``[tokens]``, ``group_scale`` float32
        ``[sets, groups]``.
    """
    return torch.ops.rrsq.quantize_smoothed(
        x, bits, group_size, scope, statistic, clip, channel_order, base, hadamard_block, hadamard_inner
    )


def linear_folded(
    operand: Tensor,
    scale: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_multiplier: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    unpacked: Tensor | None = None,
) -> Tensor:
    """``y_in = a_i w_n Σ_k operand_ik weight_nk + b_n``: one exact int32 accumulation and a rank-1 epilogue.

    Args:
        operand: int8 ``[tokens, in]`` from :func:`quantize_folded`.
        scale: float32 ``[tokens]``.
        weight_packed: uint8 ``[out, in/2]``.
        weight_scale: float32 ``[out]``.
        weight_multiplier: uint8 ``[out, in/group]`` or None.
        bias: ``[out]`` or None.
        out_dtype: dtype of the result.
        unpacked: int8 ``[out, in]`` from :func:`weight_operand`, for callers that keep it (a CPU has no
            faster way); must equal what ``weight_packed`` and ``weight_multiplier`` unpack to. None: unpacked
            in the call.

    Returns:
        ``[tokens, out]``.
    """
    return torch.ops.rrsq.linear_folded(
        operand, scale, weight_packed, weight_scale, weight_multiplier, bias, out_dtype, unpacked
    )


def linear_group_scaled(
    codes: Tensor,
    scale: Tensor,
    group_scale: Tensor,
    tokens_per_set: int,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    weight_multiplier: Tensor | None = None,
    unpacked: Tensor | None = None,
) -> Tensor:
    """``y_in = a_i w_n Σ_g s_g Σ_{k in g} code_ik weight_nk + b_n``: the fused product of arXiv 2409.20361,
    section 4.

    Args:
        codes: int8 ``[tokens, in]`` from :func:`quantize_smoothed`.
        scale: float32 ``[tokens]``.
        group_scale: float32 ``[sets, groups]``; token ``i`` belongs to set ``i // tokens_per_set``.
        tokens_per_set: tokens that share a row of ``group_scale``.
        weight_packed: uint8 ``[out, in/2]``, its columns in the channel order of ``codes``.
        weight_scale: float32 ``[out]``.
        bias: ``[out]`` or None.
        out_dtype: dtype of the result.
        weight_multiplier: uint8 ``[out, in/group]`` or None.
        unpacked: see :func:`linear_folded`.

    Returns:
        ``[tokens, out]``.
    """
    return torch.ops.rrsq.linear_group_scaled(
        codes,
        scale,
        group_scale,
        tokens_per_set,
        weight_packed,
        weight_scale,
        weight_multiplier,
        bias,
        out_dtype,
        unpacked,
    )


def linear_weight_only(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_multiplier: Tensor | None,
    bias: Tensor | None,
    unpacked: Tensor | None = None,
) -> Tensor:
    """16-bit activations: the weight is dequantized to the dtype of ``x``.

    Args:
        x: floating point ``[tokens, in]``.
        weight_packed: uint8 ``[out, in/2]``.
        weight_scale: float32 ``[out]``.
        weight_multiplier: uint8 ``[out, in/group]`` or None.
        bias: ``[out]`` or None.
        unpacked: see :func:`linear_folded`.

    Returns:
        ``[tokens, out]`` in the dtype of ``x``.
    """
    return torch.ops.rrsq.linear_weight_only(
        x, weight_packed, weight_scale, weight_multiplier, bias, unpacked
    )


def grouped_linear(
    operand: Tensor,
    scale: Tensor | None,
    group_scale: Tensor | None,
    tokens_per_set: int,
    routing: Routing,
    rows_per_token: int,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_multiplier: Tensor | None,
    out_dtype: torch.dtype,
    unpacked: Tensor | None = None,
) -> Tensor:
    """The linears of a mixture of experts: ``y_rn = a_t w_en Σ_k operand_tk weight_enk`` with token
    ``t = r // rows_per_token`` and expert ``e = experts[r]``.

    The operand is what the recipe makes of activations: that of :func:`linear_folded` (``scale`` only), of
    :func:`linear_group_scaled` (``scale`` and ``group_scale``) or of :func:`linear_weight_only` (neither).

    Args:
        operand: int8 ``[tokens, in]``, or floating point.
        scale: float32 ``[tokens]``, or None for 16-bit activations.
        group_scale: float32 ``[sets, groups]`` or None.
        tokens_per_set: tokens that share a row of ``group_scale``.
        routing: of ``tokens * rows_per_token`` rows, from :func:`rrsq.kernels.route_rows`.
        rows_per_token: rows of the result that read the same token.
        weight_packed: uint8 ``[experts, out, in/2]``.
        weight_scale: float32 ``[experts, out]``.
        weight_multiplier: uint8 ``[experts, out, in/group]`` or None.
        out_dtype: dtype of the result.
        unpacked: int8 ``[experts, out, in]``; see :func:`linear_folded`.

    Returns:
        ``[rows, out]``.
    """
    return torch.ops.rrsq.grouped_linear(
        operand,
        scale,
        group_scale,
        tokens_per_set,
        *routing,
        rows_per_token,
        weight_packed,
        weight_scale,
        weight_multiplier,
        out_dtype,
        unpacked,
    )
