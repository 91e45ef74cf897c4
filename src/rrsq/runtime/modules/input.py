"""The quantizer of one linear input, shared by every linear that reads it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import kernels
from .deferred import DeferredInput
from .rotation import OnlineHadamard

__all__ = [
    "FloatInput",
    "InputQuantizer",
    "InputScheme",
    "Int8Input",
    "PreparedLinear",
    "QuantizedInput",
    "SmoothedInput",
    "Weight",
]


@dataclass(frozen=True)
class InputScheme:
    """How one linear input becomes integers.

    Attributes:
        channels: size of the input.
        bits: 4, 8, or 16 for no quantization.
        clip: fraction of the largest magnitude that the top code stands for.
        group_size: channels that share a smoothing scale; None for no smoothing.
        scope, statistic: see :class:`rrsq.recipe.Smoothing`.
        scales: of smoothing: ``integer``, multipliers inside the int8 operand, or ``real``.
        channel_order: ``none``, ``calibrated`` or ``per_call``.
        signed: by :func:`rrsq.kernels.quantize_signed`, which rotates in blocks.
    """

    channels: int
    bits: int = 16
    clip: float = 1.0
    group_size: int | None = None
    scope: str = "token"
    statistic: str = "max"
    scales: str = "real"
    channel_order: str = "none"
    signed: bool = False

    def __post_init__(self) -> None:
        if self.group_size is not None:
            object.__setattr__(self, "group_size", math.gcd(self.group_size, self.channels))

    @property
    def simulated(self) -> bool:
        """Sorting the channels anew in each call has no integer kernel: it is simulated in float32."""
        return self.channel_order == "per_call" and self.group_size is not None

    @property
    def stores_order(self) -> bool:
        """A channel order is stored and folded into the columns of the weights."""
        return self.channel_order == "calibrated" and self.group_size is not None


class Weight(NamedTuple):
    """A packed weight as a product takes it.

    Attributes:
        packed: uint8 ``[out, in/2]``, layout of :mod:`rrsq.kernels.packing`.
        scale: float32 ``[out]``.
        multiplier: ``[out, in/group_size]``, uint8 in 1..15 or int8 in ±1..±15; or None.
        bias: ``[out]`` or None.
        unpacked: int8 ``[out, in]`` of the same weight where it is kept, or None.
    """

    packed: Tensor
    scale: Tensor
    multiplier: Tensor | None
    bias: Tensor | None
    unpacked: Tensor | None


GroupedOperand = tuple[Tensor, Tensor | None, Tensor | None, int]
"""The first arguments of :func:`rrsq.kernels.grouped_linear`."""
Call = tuple[Any, tuple[Any, ...]]
"""An operation and its arguments."""


class _Operand:
    """What a weight is multiplied by."""

    def product(self, weight: Weight, dtype: torch.dtype) -> Call:
        """What multiplies by a weight: ``[tokens, out]`` in ``dtype``."""
        raise NotImplementedError

    def grouped(self) -> GroupedOperand:
        """The same for the linears of a mixture of experts."""
        raise NotImplementedError

    def multiply(self, weight: Weight, dtype: torch.dtype) -> Tensor:
        """``x̂ Ŵᵀ + b``: ``[tokens, out]`` in ``dtype``."""
        operation, arguments = self.product(weight, dtype)
        return operation(*arguments)


@dataclass(frozen=True)
class FloatInput(_Operand):
    """Activations in floating point ``[tokens, channels]``: 16-bit ones, or a simulation's."""

    x: Tensor

    def product(self, weight: Weight, dtype: torch.dtype) -> Call:
        """See :class:`_Operand`; ``dtype`` is that of ``x``."""
        packed, scale, multiplier, bias, unpacked = weight
        return kernels.linear_w4a16, (self.x, packed, scale, multiplier, bias, unpacked)

    def grouped(self) -> GroupedOperand:
        """See :class:`_Operand`."""
        return self.x, None, None, 1


@dataclass(frozen=True)
class Int8Input(_Operand):
    """int8 ``operand [tokens, channels]`` and float32 ``scale [tokens]``: ``x ≈ operand * scale``."""

    operand: Tensor
    scale: Tensor

    def product(self, weight: Weight, dtype: torch.dtype) -> Call:
        """See :class:`_Operand`."""
        packed, scale, multiplier, bias, unpacked = weight
        arguments = self.operand, self.scale, packed, scale, multiplier, bias, dtype, unpacked
        return kernels.linear_int8, arguments

    def grouped(self) -> GroupedOperand:
        """See :class:`_Operand`."""
        return self.operand, self.scale, None, 1


@dataclass(frozen=True)
class SmoothedInput(_Operand):
    """int8 ``codes``, float32 ``scale [tokens]`` and ``group_scale [sets, groups]`` of real smoothing."""

    codes: Tensor
    scale: Tensor
    group_scale: Tensor
    tokens_per_set: int

    def product(self, weight: Weight, dtype: torch.dtype) -> Call:
        """See :class:`_Operand`."""
        packed, scale, multiplier, bias, unpacked = weight
        smoothed = self.codes, self.scale, self.group_scale, self.tokens_per_set
        return kernels.linear_group_scaled, (*smoothed, packed, scale, bias, dtype, multiplier, unpacked)

    def grouped(self) -> GroupedOperand:
        """See :class:`_Operand`."""
        return self.codes, self.scale, self.group_scale, self.tokens_per_set


QuantizedInput = FloatInput | Int8Input | SmoothedInput
PreparedLinear = tuple[Callable[..., tuple[Tensor, ...]], Callable[..., Tensor]]
"""What quantizes rows, and what multiplies the tensors that it returns by a weight."""
_ALL_TOKENS = 2**31 - 1
"""More tokens than there are: as many share a scale of the whole sequence, whatever their number."""


class InputQuantizer(nn.Module):
    """Rotate, smooth and quantize the input of one or more linears.

    Args:
        scheme: how to quantize.
        rotation: online rotation applied first, or None.
    """

    channel_order: Tensor | None

    def __init__(self, scheme: InputScheme, rotation: OnlineHadamard | None = None) -> None:
        super().__init__()
        self.scheme = scheme
        self.rotation = rotation
        order = torch.arange(scheme.channels, dtype=torch.int32) if scheme.stores_order else None
        self.register_buffer("channel_order", order)

    def forward(self, x: Tensor) -> QuantizedInput:
        """Quantize ``x`` ``[..., channels]``, flattened to tokens."""
        rows = x.reshape(-1, self.scheme.channels)
        if self._stays_float:
            return self.operand((self._floats(rows),), rows.shape[0])
        operation, arguments = self._quantization(rows.device)
        return self.operand(operation(rows, *arguments), rows.shape[0])

    def prepare(self, x: Tensor) -> Callable[[Tensor], tuple[Tensor, ...]]:
        """What quantizes activations like these, with all that will be the same looked up once.

        Args:
            x: ``[..., channels]``; see :meth:`rrsq.kernels.operation.Operation.prepare`.

        Returns:
            A function of such activations to the tensors that :meth:`forward` makes of them, but what is
            multiplied has their leading dimensions.
        """
        if not self._stays_float:
            operation, arguments = self._quantization(x.device)
            return operation.prepare(x, *arguments)
        if self.scheme.simulated:
            return lambda x: (self._floats(x),)
        if self.rotation is None:
            return lambda x: (x,)
        rotate = kernels.hadamard_transform.prepare(x.float(), *self._rotation_arguments(x.device))
        return lambda x: (rotate(x.float()).to(x.dtype),)

    def prepare_linear(self, x: Tensor, weight: Weight) -> PreparedLinear:
        """What quantizes activations like ``x``, and what makes ``[..., out]`` of the result."""
        quantize = self.prepare(x)
        operation, arguments = self.operand(quantize(x), _ALL_TOKENS).product(weight, x.dtype)
        return quantize, operation.prepare(*arguments)

    @property
    def takes_deferred(self) -> bool:
        """Whether an input may be computed by what quantizes it."""
        return self.scheme.signed and not self._stays_float

    def computed_by(
        self, operation: Callable[..., tuple[Tensor, ...]], activations: tuple[Tensor, ...], arguments: Any
    ) -> tuple[Tensor, ...]:
        """What an operation gives that computes an input where it quantizes it.

        Operand and scale come first. For what is compiled; see :class:`.deferred.DeferredInput` for the
        operation's arguments, and for modules.
        """
        return operation(*activations, *arguments, *self._quantization(activations[0].device)[1])

    def prepare_deferred(self, x: DeferredInput, weight: Weight) -> PreparedLinear:
        """:meth:`prepare_linear` of what is computed where it is quantized: for ``x.activations``."""
        quantize = x.operation.prepare(*x.activations, *x.arguments, *self._quantization(x.device)[1])
        operand, scale, *_ = quantize(*x.activations)
        operation, arguments = self.operand((operand, scale), _ALL_TOKENS).product(weight, x.dtype)
        return quantize, operation.prepare(*arguments)

    @property
    def _stays_float(self) -> bool:
        return self.scheme.bits == 16 or self.scheme.simulated

    def _floats(self, rows: Tensor) -> Tensor:
        """What is multiplied in floating point."""
        if self.scheme.bits == 16 and self.rotation is None:
            return rows
        return self.simulate(rows).to(rows.dtype)

    def operand(self, tensors: tuple[Tensor, ...], tokens: int) -> QuantizedInput:
        """What is multiplied, of the tensors that a prepared function returns for so many tokens."""
        scheme = self.scheme
        if self._stays_float:
            return FloatInput(*tensors)
        if scheme.group_size is None or scheme.scales == "integer":
            return Int8Input(*tensors)
        codes, scale, group_scale = tensors
        return SmoothedInput(codes, scale, group_scale, kernels.tokens_per_set(scheme.scope, tokens))

    def _rotation_arguments(self, device: torch.device) -> tuple[Tensor | None, int, int]:
        rotation = self.rotation
        return (
            (None, 0, 1) if rotation is None else (rotation.base(device), rotation.plan.block, rotation.inner)
        )

    def _quantization(self, device: torch.device) -> Call:
        """What makes integers of tokens, and its arguments beside them."""
        scheme = self.scheme
        if scheme.signed:
            block = 1 if self.rotation is None else self.rotation.plan.block
            return kernels.quantize_signed, (scheme.bits, scheme.group_size, block)
        rotation = self._rotation_arguments(device)
        if scheme.group_size is None or scheme.scales == "integer":
            return kernels.quantize_tokens, (scheme.bits, scheme.group_size, scheme.clip, *rotation)
        smoothing = scheme.group_size, scheme.scope, scheme.statistic, scheme.clip, self.channel_order
        return kernels.quantize_smoothed, (scheme.bits, *smoothing, *rotation)

    def undo(self, grad: Tensor) -> Tensor:
        """Gradients ``[..., channels]`` at what the linears multiply as gradients at the input itself."""
        if self.channel_order is not None:
            grad = torch.empty_like(grad).index_copy_(-1, self.channel_order.long(), grad)
        return grad if self.rotation is None else self.rotation.inverse(grad)

    def simulate(self, x: Tensor) -> Tensor:
        """What the quantized input stands for: float32 ``[..., channels]`` in the original channel order."""
        scheme = self.scheme
        if scheme.bits != 16 and (scheme.group_size is None or scheme.scales == "integer"):
            operation, arguments = self._quantization(x.device)
            operand, scale = operation(x.reshape(-1, scheme.channels), *arguments)
            return (operand.float() * scale.unsqueeze(1)).view(x.shape)
        x = x.float() if self.rotation is None else self.rotation(x.float())
        if scheme.bits == 16 or scheme.group_size is None:
            return x
        rows = x.reshape(-1, scheme.channels)
        order = rows.abs().amax(0).argsort() if scheme.simulated else self.channel_order
        codes, scale, group_scale = kernels.quantize_smoothed(
            rows, scheme.bits, scheme.group_size, scheme.scope, scheme.statistic, scheme.clip, order
        )
        size = kernels.tokens_per_set(scheme.scope, rows.shape[0])
        per_token = group_scale.repeat_interleave(size, 0)[: rows.shape[0]]
        values = codes.float() * scale.unsqueeze(1) * per_token.repeat_interleave(scheme.group_size, 1)
        if order is not None:
            values = torch.empty_like(values).index_copy_(1, order.long(), values)
        return values.view(x.shape)

    def extra_repr(self) -> str:
        """The scheme, for ``print(model)``."""
        return ", ".join(f"{key}={value}" for key, value in vars(self.scheme).items())
