"""A linear layer with INT8 weights and activations in floating point, for the output head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ... import kernels
from .gradient import StraightThrough, needs_gradient
from .prepared import QuantizedWeight

__all__ = ["PIECE", "Int8Linear", "round_rows"]

PIECE = 2**22
"""Elements rounded at once, of which there are several copies in float32 then."""
_ROWS = 16384


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of a float32 weight ``[out, in]`` to nearest, by its largest magnitude.

    Returns:
        int8 codes ``[out, in]`` in [-127, 127] and float32 scales ``[out]``.
    """
    scale = weight.abs().amax(1).clamp_min(1e-12) / 127
    return (weight / scale.unsqueeze(1)).round().to(torch.int8), scale


class Int8Linear(QuantizedWeight):
    """``y = x Ŵᵀ + b`` from int8 codes with one scale a row.

    Args:
        in_features, out_features: channels in and out.
        bias: whether there is a bias.
        dtype: dtype of the bias.

    Attributes:
        weight_int8: int8 ``[out, in]`` in [-127, 127].
        weight_scale: float32 ``[out]``.
        bias: ``[out]`` or None.
    """

    codes = "weight_int8"
    weight_int8: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.register_buffer("weight_int8", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.zeros(out_features, dtype=torch.float32))
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype) if bias else None)

    def set_weight(self, weight: Tensor) -> None:
        """Round a floating point weight ``[out, in]`` to nearest, by the largest magnitude of each row."""
        for rows in self._blocks(max(1, PIECE // self.in_features)):
            self.weight_int8[rows], self.weight_scale[rows] = round_rows(weight[rows].float())
        self._forget()

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]`` in the dtype of ``x``."""
        stays = not is_compiling() and self._stays()
        if needs_gradient(x):
            return StraightThrough.apply(x, self._multiply, self._input_gradient)
        if not stays or not x.numel():
            return self._multiply(x)
        return self._prepared.find(x, self._prepare)(x)

    def _prepare(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        return kernels.linear_w8a16.prepare(x, self.weight_int8, self.weight_scale, self.bias)

    def _multiply(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        y = kernels.linear_w8a16(rows, self.weight_int8, self.weight_scale, self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def _input_gradient(self, grad: Tensor) -> Tensor:
        scaled = grad.float() * self.weight_scale
        result = scaled.new_zeros((*grad.shape[:-1], self.in_features))
        for rows in self._blocks(_ROWS):
            result += scaled[..., rows] @ self.weight_int8[rows].float()
        return result

    def _blocks(self, count: int) -> list[slice]:
        return [slice(start, start + count) for start in range(0, self.out_features, count)]

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )
