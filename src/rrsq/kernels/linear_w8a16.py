"""The product of 8-bit weights with 16-bit activations, for output heads."""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from collections.abc import Callable

import torch
from torch import Tensor

from ._triton import ceil_div, tl, triton
from .float_gemm import MAXIMUM_TOKENS, float_gemm_plan, prepared_float_gemm
from .linear_int8 import FLOATING
from .operation import Constraints, operation

__all__ = ["linear_w8a16"]

_ROWS = 16384
"""Rows of a weight that are in floating point at once."""


def _fake(x: Tensor, weight_int8: Tensor, *_: object) -> Tensor:
    return x.new_empty((x.shape[0], weight_int8.shape[0]))


def _sizes(x: Tensor, weight_int8: Tensor, *_: object) -> tuple[tuple[str, int], ...]:
    return ("in_features", weight_int8.shape[1]), ("out_features", weight_int8.shape[0])


@operation(
    fake=_fake,
    sizes=_sizes,
    dtypes=("x",),
    rows=True,
    typical={"x": torch.bfloat16, "in_features": 4096, "out_features": 128256},
)
def linear_w8a16(x: Tensor, weight_int8: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """``y_tn = w_n Σ_k x_tk weight_nk + b_n``, summed, scaled and biased in float32, then rounded once.

    Kernels do so for up to 64 tokens. For more they multiply by ``w_n weight_nk`` rounded to the dtype of
    ``x``, which dequantized weights are in any 16-bit model.

    Args:
        x: floating point ``[tokens, in]``.
        weight_int8: int8 ``[out, in]``.
        weight_scale: float32 ``[out]``.
        bias: ``[out]`` or None.

    Returns:
        ``[tokens, out]`` in the dtype of ``x``.
    """
    precise = torch.promote_types(x.dtype, torch.float32)
    rows = x.to(precise)
    # Blocks of rows, so that no copy of the whole weight in floating point is made.
    parts = [
        torch.nn.functional.linear(rows, codes.to(precise)) * scale
        for codes, scale in zip(weight_int8.split(_ROWS), weight_scale.split(_ROWS), strict=True)
    ]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return (y if bias is None else y + bias.to(precise)).to(x.dtype)


@linear_w8a16.kernel("triton", Constraints.on_gpu(dtypes={"x": FLOATING}))
def _launch(x: Tensor, weight_int8: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    if x.shape[0] == 0:
        return torch.empty(0, weight_int8.shape[0], dtype=x.dtype, device=x.device)
    return _prepare(x, weight_int8, weight_scale, bias)(x)


def _prepare(
    x: Tensor, weight_int8: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """See :meth:`~rrsq.kernels.operation.Operation.prepare`."""
    out_features, in_features = weight_int8.shape
    tokens = x.numel() // in_features
    weight_int8 = weight_int8.contiguous()
    if tokens > MAXIMUM_TOKENS or in_features % 16 or x.dtype == torch.float32:
        return _prepare_dequantized(weight_int8, weight_scale, bias)
    plan = float_gemm_plan(tokens, out_features, in_features, bits=8)
    return prepared_float_gemm(plan, weight_int8, weight_scale, None, bias, x.shape[:-1])


_launch.prepare = _prepare  # type: ignore[attr-defined]


def _prepare_dequantized(
    weight_int8: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """Blocks of rows dequantized once, and the library's product with each."""
    blocks = tuple(zip(weight_int8.split(_ROWS), weight_scale.split(_ROWS), strict=True))

    def run(x: Tensor) -> Tensor:
        parts = []
        for codes, scale in blocks:
            parts.append(torch.nn.functional.linear(x, _dequantize(codes, scale, x.dtype)))
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return y if bias is None else y + bias.to(x.dtype)

    return run


@triton.jit
def _dequantize_kernel(
    codes_pointer, scale_pointer, out_pointer, in_features, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """One row's codes times its scale, ``BLOCK`` of them. ``ALIGNED``: rows are multiples of 16 bytes."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    stride = tl.multiple_of(in_features, 16) if ALIGNED else in_features
    codes = tl.load(codes_pointer + row * stride + channel, mask=channel < in_features, other=0)
    weight = codes.to(tl.float32) * tl.load(scale_pointer + row)
    out = out_pointer + row * stride + channel
    tl.store(out, weight.to(out_pointer.dtype.element_ty), mask=channel < in_features)


def _dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    rows, in_features = codes.shape
    out = torch.empty(rows, in_features, dtype=dtype, device=codes.device)
    _dequantize_kernel[(rows, ceil_div(in_features, 2048))](
        codes, scale, out, in_features, ALIGNED=in_features % 16 == 0, BLOCK=2048, num_warps=4
    )
    return out
