"""The product of packed weights with 16-bit activations."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .float_gemm import MAXIMUM_TOKENS, float_gemm_plan, prepared_float_gemm
from .linear_int8 import FLOATING
from .operation import Constraints, operation
from .packing import dequantize, group_size_of, supports_words, weight_operand, weight_sizes

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
    rows=True,
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

    For up to 64 tokens in 16 bits kernels multiply from the codes: with ``code * multiplier``, exact, and
    with the scale in float32 behind the sum. They agree with the reference to the rounding of its weight.

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
    if x.shape[0] == 0:
        return torch.empty(0, weight_packed.shape[0], dtype=x.dtype, device=x.device)
    return _prepare(x, weight_packed, weight_scale, weight_multiplier, bias, unpacked)(x)


def _prepare(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_multiplier: Tensor | None,
    bias: Tensor | None,
    unpacked: Tensor | None,
) -> Callable[[Tensor], Tensor]:
    """See :meth:`~rrsq.kernels.operation.Operation.prepare`.

    Few tokens are multiplied from the codes; for more, a dequantization pass and the library's product.
    """
    out_features, row_bytes = weight_packed.shape
    in_features = x.shape[-1]
    tokens = x.numel() // in_features
    packed_words = supports_words(in_features, group_size_of(in_features, weight_multiplier))
    if tokens > MAXIMUM_TOKENS or not packed_words or x.dtype == torch.float32:
        return functools.partial(
            _dequantized_product,
            weight_packed=weight_packed,
            weight_scale=weight_scale,
            weight_multiplier=weight_multiplier,
            bias=bias,
        )
    plan = float_gemm_plan(tokens, out_features, row_bytes)
    return prepared_float_gemm(plan, weight_packed, weight_scale, weight_multiplier, bias, x.shape[:-1])


_launch.prepare = _prepare  # type: ignore[attr-defined]


def _dequantized_product(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_multiplier: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    weight = dequantize(weight_packed, weight_multiplier, weight_scale, x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
