"""Experts of a mixture on INT4 weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from ..errors import CheckpointError, UsageError
from ..runtime.modules.experts import Experts, QuantizedExpertLinear
from ..runtime.rotation.rotations import Rotations
from ..runtime.scheme import group_size_for
from .linear import input_quantizer
from .parameters import narrow_groups, narrow_packed
from .places import LinearPlace

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig

__all__ = ["RRSQExpertsMethod", "load_experts"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": nn.functional.silu, "gelu": nn.functional.gelu}


class RRSQExpertsMethod(FusedMoEMethodBase):
    """All experts of a layer, whose intermediate channels are shared by the processes."""

    def __init__(self, moe: FusedMoEConfig, places: dict[str, LinearPlace], rotations: Rotations) -> None:
        super().__init__(moe)
        self.places = places
        self.rotations = rotations

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give the layer the module that a loaded checkpoint has, for the part of one process.

        Raises:
            UsageError: whole experts would be given to processes.
        """
        if num_experts != extra_weight_attrs["global_num_experts"]:
            raise UsageError(
                "Experts in 4 bits cannot be spread over processes as wholes. Leave out"
                " --enable-expert-parallel: tensor parallelism gives each process a part of every expert."
            )
        channels = intermediate_size_per_partition
        whole = channels * self.moe.moe_parallel_config.tp_size

        def linear(name: str, whole_input: int, inputs: int, outputs: int) -> QuantizedExpertLinear:
            place = self.places[name]
            group_size = group_size_for(group_size_for(place.how.weights.group_size, whole_input), inputs)
            quantizer = input_quantizer(place, self.rotations, whole_input, inputs)
            made = QuantizedExpertLinear(
                num_experts,
                inputs,
                outputs,
                group_size=group_size,
                signed=place.how.weights.signed,
                input_quantizer=quantizer,
            )
            made.weight_scale.fill_(float("nan"))
            made.register_module("input", quantizer)  # Its channel order is a tensor of the checkpoint.
            return made

        layer.quantized = Experts(
            linear("gate_up", hidden_size, hidden_size, 2 * channels),
            linear("down", whole, channels, hidden_size),
            _ACTIVATIONS[layer.activation.value],
            num_experts,
        )

    def process_weights_after_loading(self, layer: Any) -> None:
        """Refuse experts that were not loaded.

        Raises:
            CheckpointError: a scale was not loaded.
        """
        for linear in (layer.quantized.gate_up_proj, layer.quantized.down_proj):
            if bool(linear.weight_scale.isnan().any()):
                raise CheckpointError(
                    f"Tensors of the experts of '{self.places['down'].layer}' are missing or hold NaN."
                )
            if linear.input_quantizer.rotation is not None:
                linear.input_quantizer.rotation.base(linear.weight_packed.device)

    def get_fused_moe_quant_config(self, layer: nn.Module) -> FusedMoEQuantConfig | None:
        """None: it is for vLLM's own kernels."""
        return None

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """``[tokens, hidden]`` to the experts' weighted sum of that shape. Shared ones are vLLM's to run."""
        return layer.quantized(x, topk_ids, topk_weights)


def load_experts(layer: Any, name: str, tensor: Tensor) -> str:
    """Give the experts of a layer, in 4 or 16 bits, their part of a tensor of all experts.

    Args:
        layer: vLLM's ``RoutedExperts``.
        name: of the linear and the tensor in it, such as ``gate_up_proj.weight_packed``.
        tensor: ``[experts, ...]``, or a channel order.

    Returns:
        The name of the tensor that was filled, from ``layer``.
    """
    linear, _, kind = name.partition(".")
    rank, parts = layer.moe_config.tp_rank, layer.moe_config.tp_size
    if hasattr(layer, "quantized"):
        name = f"quantized.{name}"
        target = layer.get_buffer(name)
    else:
        name = "w13_weight" if linear == "gate_up_proj" else "w2_weight"
        target = layer.get_parameter(name).data
    if parts > 1 and kind != "input.channel_order":
        if linear == "gate_up_proj":
            rows = target.shape[1] // 2
            halves = tensor.chunk(2, dim=1)
            tensor = torch.cat([half.narrow(1, rank * rows, rows) for half in halves], dim=1)
        elif kind != "weight_scale":
            channels = layer.intermediate_size_per_partition
            if kind == "weight_packed":
                tensor = narrow_packed(tensor, rank * channels, channels)
            elif kind == "weight_multiplier":
                tensor = narrow_groups(tensor, rank * channels, channels, parts)
            else:
                tensor = tensor.narrow(2, rank * channels, channels)
    if tensor.shape != target.shape:
        raise CheckpointError(f"it has the shape {list(tensor.shape)} where {list(target.shape)} is needed")
    target.copy_(tensor)
    return name
