"""RMSNorm (arXiv 1910.07467) in one pass: transformers' own takes seven kernels."""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._triton import next_power_of_two, tl, triton
from .operation import Constraints, operation

__all__ = ["rms_norm"]


def _fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _sizes(x: Tensor, *_: object) -> tuple[tuple[str, int], ...]:
    return (("channels", x.shape[-1]),)


@operation(
    fake=_fake,
    sizes=_sizes,
    dtypes=("x",),
    typical={"x": torch.bfloat16, "channels": 4096},
    activations=2,
)
def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, late: bool) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * (offset + weight)`` over the last dimension, in float32.

    Args:
        x: ``[..., channels]`` floating point.
        weight: ``[channels]``.
        eps: added to the mean square.
        offset: 1 where gains are stored as what exceeds 1, as Gemma's are.
        late: the gain is multiplied in float32 and the product rounded once (Gemma); else what is normalized
            is rounded to the dtype of ``x`` first (Llama).

    Returns:
        The shape and dtype of ``x``, contiguous.
    """
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if late:
        return (y * (offset + weight.float())).to(x.dtype)
    return (offset + weight) * y.to(x.dtype)


@triton.jit
def _rms_norm_kernel(
    x_pointer,
    weight_pointer,
    y_pointer,
    stride,
    channels,
    eps,
    offset,
    LATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < channels
    x = tl.load(x_pointer + row * stride + channel, mask=inside, other=0.0)
    weight = tl.load(weight_pointer + channel, mask=inside, other=0.0).to(tl.float32) + offset
    wide = x.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / channels + eps)
    if not LATE:
        wide = wide.to(x.dtype).to(tl.float32)
    tl.store(y_pointer + row * channels + channel, (wide * weight).to(x.dtype), mask=inside)


@rms_norm.kernel(
    "triton",
    Constraints.on_gpu(
        dtypes={"x": frozenset({torch.float16, torch.bfloat16, torch.float32})}, at_most={"channels": 32768}
    ),
)
def _launch(x: Tensor, weight: Tensor, eps: float, offset: float, late: bool) -> Tensor:
    return _prepare(x, weight, eps, offset, late)(x, weight)


def _prepare(
    x: Tensor, weight: Tensor, eps: float, offset: float, late: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    """See :meth:`~rrsq.kernels.operation.Operation.prepare`; for any number of tokens."""
    channels = x.shape[-1]
    block = next_power_of_two(channels)
    warps = min(max(block // 512, 1), 16)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        tokens, stride, rows = x.numel() // channels, channels, x
        if not x.is_contiguous():
            rows = x if x.ndim == 2 else x.reshape(-1, channels)
            rows = rows if rows.stride(1) == 1 else rows.contiguous()
            stride = rows.stride(0)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        if tokens:
            _rms_norm_kernel[(tokens,)](
                rows,
                weight,
                y,
                stride,
                channels,
                eps,
                offset,
                late,
                block,
                num_warps=warps,
            )
        return y

    return run


_launch.prepare = _prepare  # type: ignore[attr-defined]
