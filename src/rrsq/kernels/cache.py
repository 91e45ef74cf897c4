"""Storage of cached keys and values in 4 or 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from .codes import code_max

__all__ = ["decode_cache", "encode_cache"]

_HALF_MAX = torch.finfo(torch.float16).max
_HALF_TINY = 2.0**-24


def encode_cache(
    x: Tensor, bits: int, group_size: int, zero_point: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize along the last dimension in groups.

    Symmetric: codes of ±code_max whose outermost rounding cells end at the largest magnitude. With a zero
    point: ``2**bits`` levels from the group's minimum to its maximum. The scale is rounded to float16 first,
    so that what is stored is what was used.

    Args:
        x: ``[..., head_dim]`` floating point.
        bits: 4 (two codes a byte: entry ``j`` low, ``j + head_dim/2`` high) or 8.
        group_size: divides ``head_dim``.
        zero_point: store the group's minimum too.

    Returns:
        ``codes`` uint8 ``[..., head_dim * bits / 8]``, ``scale`` float16 ``[..., groups]`` and ``minimum``
        float16 ``[..., groups]`` or None.
    """
    grouped = x.float().unflatten(-1, (-1, group_size))
    if zero_point:
        low = grouped.amin(-1).clamp(-_HALF_MAX, _HALF_MAX).half()
        span = grouped.amax(-1) - low.float()
        scale = (span / (2**bits - 1)).clamp(_HALF_TINY, _HALF_MAX).half()
        codes = (grouped - low.float().unsqueeze(-1)) / scale.float().unsqueeze(-1)
        codes = codes.round().clamp(0, 2**bits - 1)
    else:
        low = None
        top = code_max(bits)
        scale = (grouped.abs().amax(-1) / (top + 0.5)).clamp(_HALF_TINY, _HALF_MAX).half()
        codes = (grouped / scale.float().unsqueeze(-1)).round().clamp(-top, top) + (top + 1)
    codes = codes.flatten(-2).to(torch.uint8)
    if bits == 4:
        half = codes.shape[-1] // 2
        codes = codes[..., :half] | (codes[..., half:] << 4)
    return codes, scale, low


def decode_cache(codes: Tensor, scale: Tensor, minimum: Tensor | None, bits: int) -> Tensor:
    """Undo :func:`encode_cache`: float32 ``[..., head_dim]``."""
    if bits == 4:
        codes = torch.cat((codes & 0xF, codes >> 4), dim=-1)
    grouped = codes.float().unflatten(-1, (scale.shape[-1], -1))
    if minimum is None:
        grouped = grouped - (code_max(bits) + 1)
    values = grouped * scale.float().unsqueeze(-1)
    if minimum is not None:
        values = values + minimum.float().unsqueeze(-1)
    return values.flatten(-2)
