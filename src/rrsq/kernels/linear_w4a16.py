"""The product of packed weights with 16-bit activations."""

from __future__ import annotations

import torch
from torch import Tensor

from .linear_int8 import FLOATING
from .operation import Constraints, operation
from .packing import dequantize, weight_operand, weight_sizes

__all__ = ["linear_w4a16"]


def _fake(x: Tensor, weight_packed: Tensor, *_: object) -> Tensor:
    return x.new_empty((x.shape[0], weight_packed.shape[0]))


def _sizes(
    x: Tensor, weight_packed: Tensor, weight_scale: Tensor, weight_multiplier: Tensor | None, *_: object
) -> tuple[tuple[str, int], ...]:
    return weight_sizes(weight_packed, weight_multiplier)


@operation(
    fake=_fake,
    sizes=_sizes,
    dtypes=("x",),
    typical={
        "x": torch.bfloat16,
        "in_features": 4096,
        "out_features": 4096,
        "weight_group_size": 32,
    },
)
def linear_w4a16(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_multiplier: Tensor | None,
    bias: Tensor | None,
    unpacked: Tensor | None = None,
) -> Tensor:
    """``y = x Ŵᵀ + b``: the weight is dequantized to the dtype of ``x`` and multiplied in floating point.

    Args:
        x: floating point ``[tokens, in]``.
        weight_packed: uint8 ``[out, in/2]``.
        weight_scale: float32 ``[out]``.
        weight_multiplier: uint8 ``[out, in/group]`` or None.
        bias: ``[out]`` or None.
        unpacked: see :func:`~rrsq.kernels.linear_int8`.

    Returns:
        ``[tokens, out]`` in the dtype of ``x``.
    """
    codes = weight_operand.reference(weight_packed, weight_multiplier) if unpacked is None else unpacked
    weight = (codes.to(torch.float32) * weight_scale.unsqueeze(1)).to(x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


@linear_w4a16.kernel("triton", Constraints.on_gpu(dtypes={"x": FLOATING}))
def _launch(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_multiplier: Tensor | None,
    bias: Tensor | None,
    unpacked: Tensor | None,
) -> Tensor:
    """A dequantization pass, then the library's product."""
    weight = dequantize(weight_packed, weight_multiplier, weight_scale, x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
