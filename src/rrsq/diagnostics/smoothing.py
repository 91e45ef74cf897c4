"""Runtime smoothing by itself: what a recipe's scales leave of an input before it is rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.codes import integer_scales
from ..kernels.quantize_smoothed import smoothing_scale, tokens_per_set
from ..runtime.modules.input import InputScheme

__all__ = ["smooth"]


def smooth(x: Tensor, scheme: InputScheme, channel_order: Tensor | None) -> Tensor:
    """Divide rotated activations by the smoothing scales of a scheme.

    With integer scales that is the division by ``a_i m_ig``, else by ``s_g(T)``
    (:mod:`rrsq.kernels.codes`, :mod:`rrsq.kernels.quantize_smoothed`). Without smoothing nothing changes.

    Args:
        x: float32 ``[tokens, channels]`` of one window, in the original channel order.
        scheme: of the input.
        channel_order: int ``[channels]`` in which groups are cut, or None.

    Returns:
        float32 ``[tokens, channels]``, in the original channel order.
    """
    if scheme.group_size is None or scheme.bits == 16:
        return x
    ordered = x if channel_order is None else x[:, channel_order]
    grouped = ordered.view(x.shape[0], -1, scheme.group_size)
    if scheme.scales == "integer":
        scale, multiplier = integer_scales(grouped.abs().amax(2), scheme.bits, scheme.clip)
        scales = scale.unsqueeze(1) * multiplier
    else:
        size = tokens_per_set(scheme.scope, x.shape[0])
        shared = smoothing_scale(ordered, scheme.group_size, scheme.scope, scheme.statistic)
        scales = shared.repeat_interleave(size, 0)[: x.shape[0]]
    smoothed = (grouped / scales.unsqueeze(2)).view_as(ordered)
    if channel_order is None:
        return smoothed
    return torch.empty_like(smoothed).index_copy_(1, channel_order.long(), smoothed)
