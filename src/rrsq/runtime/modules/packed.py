"""INT4 weights as a module stores them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import kernels
from .input import InputQuantizer

__all__ = ["PackedWeight"]


class PackedWeight(nn.Module):
    """Packed INT4 codes with their scales, and the quantizer of what they multiply.

    The input quantizer may be shared with other linears and is owned by their parent, so it is no submodule
    here.

    Args:
        shape: ``[..., out, in]`` of the weight; ``in`` is even.
        group_size: channels an integer multiplier covers, a divisor of ``in``; None for none.
        input_quantizer: quantizer of the input.

    Attributes:
        weight_packed: uint8 ``[..., out, in/2]``, layout of :mod:`rrsq.kernels.packing`.
        weight_scale: float32 ``[..., out]``.
        weight_multiplier: uint8 ``[..., out, in/group_size]`` in 1..15, or None.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_multiplier: Tensor | None

    def __init__(
        self, shape: tuple[int, ...], *, group_size: int | None, input_quantizer: InputQuantizer
    ) -> None:
        super().__init__()
        *leading, in_features = shape
        self.group_size = group_size
        self.register_buffer("weight_packed", torch.zeros(*leading, in_features // 2, dtype=torch.uint8))
        self.register_buffer("weight_scale", torch.zeros(*leading, dtype=torch.float32))
        multiplier = None
        if group_size is not None:
            multiplier = torch.ones(*leading, in_features // group_size, dtype=torch.uint8)
        self.register_buffer("weight_multiplier", multiplier)
        self._input = (input_quantizer,)
        self._operand: Tensor | None = None

    @property
    def input_quantizer(self) -> InputQuantizer:
        """The shared quantizer of this weight's input."""
        return self._input[0]

    def set_weight(
        self, codes: Tensor, scale: Tensor, multiplier: Tensor | None, index: tuple[int, ...] = ()
    ) -> None:
        """Store one matrix: int codes ``[out, in]`` in [-8, 7], float32 scales ``[out]``, multipliers.

        ``index`` says which one where there are several.
        """
        self.weight_packed[index] = kernels.pack_int4(codes).to(self.weight_packed.device)
        self.weight_scale[index] = scale.to(self.weight_scale.device)
        if self.weight_multiplier is not None and multiplier is not None:
            self.weight_multiplier[index] = multiplier.to(self.weight_multiplier.device)
        self._operand = None

    def dequantized_weight(self) -> Tensor:
        """The weight the codes stand for: float32 ``[..., out, in]``, columns in the stored channel order."""
        return self._unpacked().float() * self.weight_scale.unsqueeze(-1)

    def _unpacked(self) -> Tensor:
        """The int8 operand ``[..., out, in]``."""
        packed, multiplier = self.weight_packed, self.weight_multiplier
        rows = packed.reshape(-1, packed.shape[-1])
        groups = None if multiplier is None else multiplier.reshape(-1, multiplier.shape[-1])
        return kernels.weight_operand(rows, groups).view(*packed.shape[:-1], -1)

    def _cpu_operand(self) -> Tensor | None:
        """The unpacked int8 weight, kept on CPU: unpacking at each call would cost more than the product."""
        if self.weight_packed.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        if self._operand is None:
            self._operand = self._unpacked()
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
