"""Linears of vLLM on INT4 weights: one quantization and one product each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method

from ..errors import CheckpointError
from ..runtime.modules.input import InputQuantizer, Int8Input, Weight
from ..runtime.modules.linear import multiplier_dtype
from ..runtime.modules.rotation import online_rotation
from ..runtime.rotation.rotations import Rotations
from ..runtime.scheme import group_size_for, input_scheme
from .limits import shard_rotation, shard_scheme
from .parameters import Multipliers, Packed, PartOfWeight, Scales, empty_scales
from .places import LinearPlace

__all__ = ["QuantizedRows", "RRSQLinearMethod", "input_quantizer"]


def input_quantizer(place: LinearPlace, rotations: Rotations, whole: int, channels: int) -> InputQuantizer:
    """The quantizer of an input, or of the part of it that one process has.

    Args:
        place: the input.
        rotations: of the model.
        whole: channels of the whole input.
        channels: of one process.

    Raises:
        UsageError: the input cannot be cut there.
    """
    scheme = input_scheme(place.how.activations, place.entry, whole)
    rotation = online_rotation(place.entry, rotations, whole)
    return InputQuantizer(
        shard_scheme(place.path, scheme, channels), shard_rotation(place.path, rotation, channels)
    )


class QuantizedRows:
    """An input ``[tokens, channels]`` that is quantized already, of a linear with no rows in 16 bits.

    Args:
        operand, scale: see :class:`~rrsq.runtime.modules.input.Int8Input`.
        dtype: of what was quantized.
    """

    def __init__(self, operand: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        self.quantized = Int8Input(operand, scale)
        self.shape = operand.shape
        self.dtype = dtype


@register_weight_loader_v2_supported_method
class RRSQLinearMethod(LinearMethodBase):
    """A linear of which all or some rows are in 4 bits.

    vLLM fuses linears that a recipe may treat differently. Those in 4 bits are together in ``weight_packed``,
    ``weight_scale`` and ``weight_multiplier``, those in 16 bits in ``weight``; both only where both exist.
    """

    def __init__(self, place: LinearPlace, rotations: Rotations) -> None:
        self.place = place
        self.rotations = rotations

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Empty parameters and the quantizer of the input, for the part of one process.

        Raises:
            UsageError: the input cannot be cut into such parts.
        """
        load: Callable[..., None] = extra_weight_attrs["weight_loader"]
        channels = input_size_per_partition
        layer.input_quantizer = input_quantizer(self.place, self.rotations, input_size, channels)
        quantized = self.place.quantized
        if len(quantized) == 1:
            quantized *= len(output_partition_sizes)
        # Runs of rows of one kind, in the order of the result.
        layer.row_runs = list(zip(quantized, output_partition_sizes, strict=True))
        rows = {kind: sum(n for k, n in layer.row_runs if k is kind) for kind in (True, False)}
        packed = Packed(
            data=torch.zeros(rows[True], channels // 2, dtype=torch.uint8),
            input_dim=1,
            output_dim=0,
            weight_loader=load,
        )
        parts: dict[str, Any] = {
            "weight_packed": packed,
            "weight_scale": Scales(data=empty_scales(rows[True]), output_dim=0, weight_loader=load),
            "weight_multiplier": None,
        }
        group_size = group_size_for(self.place.how.weights.group_size, input_size)
        if group_size is not None:
            groups = channels // math.gcd(group_size, channels)
            dtype = multiplier_dtype(self.place.how.weights.signed)
            multiplier = torch.zeros(rows[True], groups, dtype=dtype)
            parts["weight_multiplier"] = Multipliers(
                data=multiplier, input_dim=1, output_dim=0, weight_loader=load
            )
            parts["weight_multiplier"].channels = channels
        if rows[False]:
            weight = torch.empty(rows[False], channels, dtype=params_dtype)
            parts["weight"] = PartOfWeight(data=weight, input_dim=1, output_dim=0, weight_loader=load)
        for name, parameter in parts.items():
            layer.register_parameter(name, parameter)
            if parameter is not None and rows[False]:
                parameter.rows_before = _rows_before(layer.row_runs, kind=name != "weight")

    def process_weights_after_loading(self, layer: Any) -> None:
        """Plain parameters, which compiled code takes as they are.

        Raises:
            CheckpointError: a scale was not loaded.
        """
        for name, parameter in list(layer.named_parameters(recurse=False)):
            if name != "bias":
                layer.register_parameter(name, nn.Parameter(parameter.data, requires_grad=False))
        if bool(layer.weight_scale.isnan().any()):
            raise CheckpointError(f"Tensors of '{self.place.path}' are missing or hold NaN.")
        rotation = layer.input_quantizer.rotation
        if rotation is not None:
            rotation.base(layer.weight_packed.device)

    def apply(self, layer: Any, x: Any, bias: Tensor | None = None) -> Tensor:
        """``[..., in]``, a tensor or :class:`QuantizedRows`, to ``[..., out]`` in the dtype of ``x``."""
        weight = Weight(layer.weight_packed, layer.weight_scale, layer.weight_multiplier, None, None)
        quantized = x.quantized if isinstance(x, QuantizedRows) else layer.input_quantizer(x)
        if all(kind for kind, _ in layer.row_runs):
            y = quantized.multiply(weight._replace(bias=bias), x.dtype)
            return y.view(*x.shape[:-1], y.shape[-1])
        products = {
            True: quantized.multiply(weight, x.dtype).view(*x.shape[:-1], -1),
            False: nn.functional.linear(x, layer.weight),
        }
        taken = {True: 0, False: 0}
        parts = []
        for kind, rows in layer.row_runs:
            parts.append(products[kind].narrow(-1, taken[kind], rows))
            taken[kind] += rows
        y = torch.cat(parts, -1)
        return y if bias is None else y + bias


def _rows_before(runs: list[tuple[bool, int]], kind: bool) -> tuple[int, ...]:
    """Of each run, the rows before it that are not of a kind."""
    return tuple(sum(n for k, n in runs[:index] if k is not kind) for index in range(len(runs)))
