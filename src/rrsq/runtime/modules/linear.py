"""A linear layer with INT4 weights and integer arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import kernels
from .input import InputQuantizer, Int8Input, SmoothedInput
from .packed import PackedWeight

__all__ = ["QuantizedLinear"]


class QuantizedLinear(PackedWeight):
    """``y = x̂ Ŵᵀ + b`` from packed INT4 codes.

    Args:
        in_features: channels in; even.
        out_features: channels out.
        group_size: channels an integer multiplier covers, a divisor of ``in_features``; None for none.
        bias: whether there is a bias.
        input_quantizer: quantizer of the input.
        dtype: dtype of the bias.

    Attributes:
        bias: ``[out]`` or None; for the others see :class:`PackedWeight`.
    """

    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        group_size: int | None,
        bias: bool,
        input_quantizer: InputQuantizer,
        dtype: torch.dtype,
    ) -> None:
        super().__init__((out_features, in_features), group_size=group_size, input_quantizer=input_quantizer)
        self.in_features = in_features
        self.out_features = out_features
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]`` in the dtype of ``x``."""
        quantized = self.input_quantizer(x)
        if isinstance(quantized, Int8Input):
            y = kernels.linear_int8(
                quantized.operand,
                quantized.scale,
                self.weight_packed,
                self.weight_scale,
                self.weight_multiplier,
                self.bias,
                x.dtype,
                self._cpu_operand(),
            )
        elif isinstance(quantized, SmoothedInput):
            y = kernels.linear_group_scaled(
                quantized.codes,
                quantized.scale,
                quantized.group_scale,
                quantized.tokens_per_set,
                self.weight_packed,
                self.weight_scale,
                self.bias,
                x.dtype,
                self.weight_multiplier,
                self._cpu_operand(),
            )
        else:
            y = kernels.linear_w4a16(
                quantized.x,
                self.weight_packed,
                self.weight_scale,
                self.weight_multiplier,
                self.bias,
                self._cpu_operand(),
            )
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"group_size={self.group_size}, bias={self.bias is not None}"
        )
