"""The quantizer of one linear input, shared by every linear that reads it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ... import kernels
from .rotation import OnlineHadamard

__all__ = [
    "FloatInput",
    "InputQuantizer",
    "InputScheme",
    "Int8Input",
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
    """

    channels: int
    bits: int = 16
    clip: float = 1.0
    group_size: int | None = None
    scope: str = "token"
    statistic: str = "max"
    scales: str = "real"
    channel_order: str = "none"

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
        multiplier: uint8 ``[out, in/group_size]`` in 1..15, or None.
        bias: ``[out]`` or None.
        unpacked: int8 ``[out, in]`` of the same weight where it is kept, or None.
    """

    packed: Tensor
    scale: Tensor
    multiplier: Tensor | None
    bias: Tensor | None
    unpacked: Tensor | None


@dataclass(frozen=True)
class FloatInput:
    """Activations in floating point ``[tokens, channels]``: 16-bit ones, or a simulation's."""

    x: Tensor

    def multiply(self, weight: Weight, dtype: torch.dtype) -> Tensor:
        """``x Ŵᵀ + b``: ``[tokens, out]`` in ``dtype``, that of ``x``."""
        return kernels.linear_w4a16(
            self.x, weight.packed, weight.scale, weight.multiplier, weight.bias, weight.unpacked
        )


@dataclass(frozen=True)
class Int8Input:
    """int8 ``operand [tokens, channels]`` and float32 ``scale [tokens]``: ``x ≈ operand * scale``."""

    operand: Tensor
    scale: Tensor

    def multiply(self, weight: Weight, dtype: torch.dtype) -> Tensor:
        """``x̂ Ŵᵀ + b``: ``[tokens, out]`` in ``dtype``."""
        return kernels.linear_int8(
            self.operand,
            self.scale,
            weight.packed,
            weight.scale,
            weight.multiplier,
            weight.bias,
            dtype,
            weight.unpacked,
        )


@dataclass(frozen=True)
class SmoothedInput:
    """int8 ``codes``, float32 ``scale [tokens]`` and ``group_scale [sets, groups]`` of real smoothing."""

    codes: Tensor
    scale: Tensor
    group_scale: Tensor
    tokens_per_set: int

    def multiply(self, weight: Weight, dtype: torch.dtype) -> Tensor:
        """``x̂ Ŵᵀ + b``: ``[tokens, out]`` in ``dtype``."""
        return kernels.linear_group_scaled(
            self.codes,
            self.scale,
            self.group_scale,
            self.tokens_per_set,
            weight.packed,
            weight.scale,
            weight.bias,
            dtype,
            weight.multiplier,
            weight.unpacked,
        )


QuantizedInput = FloatInput | Int8Input | SmoothedInput


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
        scheme = self.scheme
        rows = x.reshape(-1, scheme.channels)
        if scheme.bits == 16 or scheme.simulated:
            return FloatInput(self.simulate(rows).to(x.dtype))
        if scheme.group_size is None or scheme.scales == "integer":
            return self._quantize_tokens(rows)
        codes, scale, group_scale = kernels.quantize_smoothed(
            rows,
            scheme.bits,
            scheme.group_size,
            scheme.scope,
            scheme.statistic,
            scheme.clip,
            self.channel_order,
            *self._rotation_arguments(rows.device),
        )
        size = kernels.tokens_per_set(scheme.scope, rows.shape[0])
        return SmoothedInput(codes, scale, group_scale, size)

    def prepare(self, rows: Tensor, weight: Weight, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
        """What quantizes rows like ``[tokens, channels]`` and multiplies them by a weight, looked up once.

        None where no integers without real group scales are multiplied.
        """
        scheme = self.scheme
        if scheme.bits == 16 or not (scheme.group_size is None or scheme.scales == "integer"):
            return None
        rotation = self._rotation_arguments(rows.device)
        quantize = kernels.quantize_tokens.prepare(
            rows, scheme.bits, scheme.group_size, scheme.clip, *rotation
        )
        multiply = kernels.linear_int8.prepare(
            *quantize(rows),
            weight.packed,
            weight.scale,
            weight.multiplier,
            weight.bias,
            dtype,
            weight.unpacked,
        )

        def run(rows: Tensor) -> Tensor:
            return multiply(*quantize(rows))

        return run

    def _rotation_arguments(self, device: torch.device) -> tuple[Tensor | None, int, int]:
        rotation = self.rotation
        return (
            (None, 0, 1) if rotation is None else (rotation.base(device), rotation.plan.block, rotation.inner)
        )

    def _quantize_tokens(self, rows: Tensor) -> Int8Input:
        scheme = self.scheme
        rotation = self._rotation_arguments(rows.device)
        return Int8Input(
            *kernels.quantize_tokens(rows, scheme.bits, scheme.group_size, scheme.clip, *rotation)
        )

    def undo(self, grad: Tensor) -> Tensor:
        """Gradients ``[..., channels]`` at what the linears multiply as gradients at the input itself."""
        if self.channel_order is not None:
            grad = torch.empty_like(grad).index_copy_(-1, self.channel_order.long(), grad)
        return grad if self.rotation is None else self.rotation.inverse(grad)

    def simulate(self, x: Tensor) -> Tensor:
        """What the quantized input stands for: float32 ``[..., channels]`` in the original channel order."""
        scheme = self.scheme
        if scheme.bits != 16 and (scheme.group_size is None or scheme.scales == "integer"):
            quantized = self._quantize_tokens(x.reshape(-1, scheme.channels))
            return (quantized.operand.float() * quantized.scale.unsqueeze(1)).view(x.shape)
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
