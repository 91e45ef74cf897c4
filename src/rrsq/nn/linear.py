"""A linear layer with INT4 weights and integer arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from .input import FoldedInput, InputQuantizer, SmoothedInput

__all__ = ["QuantizedLinear"]


class QuantizedLinear(nn.Module):
    """``y = x̂ Ŵᵀ + b`` from packed INT4 codes.

    The input quantizer is shared with other linears and owned by their parent, so it is no submodule here.

    Args:
        in_features: channels in; even.
        out_features: channels out.
        group_size: channels an integer multiplier covers, a divisor of ``in_features``; None for none.
        bias: whether there is a bias.
        input_quantizer: quantizer of the input.
        dtype: dtype of the bias.

    Attributes:
        weight_packed: uint8 ``[out, in/2]``, layout of :mod:`rrsq.kernels.eager.packing`.
        weight_scale: float32 ``[out]``.
        weight_multiplier: uint8 ``[out, in/group_size]`` in 1..15, or None.
        bias: ``[out]`` or None.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_multiplier: Tensor | None
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
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.group_size = group_size
        groups = None if group_size is None else in_features // group_size
        self.register_buffer("weight_packed", torch.zeros(out_features, in_features // 2, dtype=torch.uint8))
        self.register_buffer("weight_scale", torch.zeros(out_features, dtype=torch.float32))
        multiplier = None if groups is None else torch.ones(out_features, groups, dtype=torch.uint8)
        self.register_buffer("weight_multiplier", multiplier)
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype) if bias else None)
        self._input = (input_quantizer,)
        self._operand: Tensor | None = None

    @property
    def input_quantizer(self) -> InputQuantizer:
        """The shared quantizer of this linear's input."""
        return self._input[0]

    def set_weight(self, codes: Tensor, scale: Tensor, multiplier: Tensor | None) -> None:
        """Store int codes ``[out, in]`` in [-8, 7], float32 scales ``[out]`` and the groups' multipliers."""
        self.weight_packed.copy_(kernels.pack_int4(codes))
        self.weight_scale.copy_(scale)
        if self.weight_multiplier is not None and multiplier is not None:
            self.weight_multiplier.copy_(multiplier)
        self._operand = None

    def dequantized_weight(self) -> Tensor:
        """The weight the codes stand for: float32 ``[out, in]``, columns in the stored channel order."""
        operand = kernels.weight_operand(self.weight_packed, self.weight_multiplier)
        return operand.float() * self.weight_scale.unsqueeze(1)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]`` in the dtype of ``x``."""
        quantized = self.input_quantizer(x)
        if isinstance(quantized, FoldedInput):
            y = kernels.linear_folded(
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
            y = kernels.linear_weight_only(
                quantized.x,
                self.weight_packed,
                self.weight_scale,
                self.weight_multiplier,
                self.bias,
                self._cpu_operand(),
            )
        return y.view(*x.shape[:-1], self.out_features)

    def _cpu_operand(self) -> Tensor | None:
        """The unpacked int8 weight, kept on CPU: unpacking at each call would cost more than the product."""
        if self.weight_packed.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        if self._operand is None:
            self._operand = kernels.weight_operand(self.weight_packed, self.weight_multiplier)
        return self._operand

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Scales stay float32 whatever dtype the model is cast to; an unpacked copy belongs to the old device.
        self._operand = None
        scale = self.weight_scale
        module = super()._apply(fn, recurse)
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale = scale.to(self.weight_scale.device)
        return module

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._operand = None
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"group_size={self.group_size}, bias={self.bias is not None}"
        )
