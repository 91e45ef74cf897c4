"""Quantized output heads, whose rows are shared by vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.utils import set_weight_attrs

from .. import kernels
from ..errors import CheckpointError
from ..recipe import Recipe
from ..runtime.modules.input import FloatInput, Weight
from ..runtime.modules.linear import multiplier_dtype
from ..runtime.scheme import group_size_for
from .parameters import empty_scales

__all__ = ["HeadMethod"]


class HeadMethod(QuantizeMethodBase):
    """An output head in 8 or 4 bits, with its input in floating point."""

    def __init__(self, recipe: Recipe) -> None:
        self.bits = recipe.head.bits
        self.group_size = recipe.weights.group_size
        self.signed = recipe.weights.signed

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
        """Empty parameters for the rows of one process, of which some may stand for no token."""
        rows, channels = sum(output_partition_sizes), input_size
        parts: dict[str, Tensor | None] = {"weight_scale": empty_scales(rows), "weight_multiplier": None}
        if self.bits == 8:
            parts["weight_int8"] = torch.zeros(rows, channels, dtype=torch.int8)
        else:
            parts["weight_packed"] = torch.zeros(rows, channels // 2, dtype=torch.uint8)
            group_size = group_size_for(self.group_size, channels)
            if group_size is not None:
                parts["weight_multiplier"] = torch.zeros(
                    rows, channels // group_size, dtype=multiplier_dtype(self.signed)
                )

        def load(parameter: nn.Parameter, loaded: Tensor) -> None:
            layer.weight_loader(parameter, loaded)
            parameter.data[layer.num_org_embeddings_per_partition :] = 1

        for name, data in parts.items():
            parameter = None if data is None else nn.Parameter(data, requires_grad=False)
            layer.register_parameter(name, parameter)
            if parameter is not None:
                set_weight_attrs(parameter, {"output_dim": 0, "weight_loader": load})

    def process_weights_after_loading(self, layer: Any) -> None:
        """Refuse a head that was not loaded.

        Raises:
            CheckpointError: a scale was not loaded.
        """
        if bool(layer.weight_scale.isnan().any()):
            raise CheckpointError("Tensors of the output head are missing or hold NaN.")

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``[..., in]`` to logits ``[..., rows]`` in the dtype of ``x``."""
        rows = x.reshape(-1, x.shape[-1])
        if self.bits == 8:
            y = kernels.linear_w8a16(rows, layer.weight_int8, layer.weight_scale, bias)
        else:
            weight = Weight(layer.weight_packed, layer.weight_scale, layer.weight_multiplier, bias, None)
            y = FloatInput(rows).multiply(weight, x.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])
