"""Quantized output heads and embeddings, whose rows are shared by vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.utils import set_weight_attrs

from .. import kernels
from ..errors import CheckpointError
from ..recipe import Recipe
from ..runtime.modules.embedding import block_rotation, int8_rows, packed_rows
from ..runtime.modules.input import FloatInput, Weight
from ..runtime.modules.linear import multiplier_dtype
from ..runtime.scheme import group_size_for
from .parameters import empty_scales
from .places import Places

__all__ = ["EmbeddingMethod", "HeadMethod", "quantize_embedding"]


class HeadMethod(QuantizeMethodBase):
    """An output head in 8 or 4 bits, with its input in floating point."""

    what = "output head"

    def __init__(self, recipe: Recipe) -> None:
        self.bits: int = recipe.head.bits
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
        """Refuse what was not loaded.

        Raises:
            CheckpointError: a scale was not loaded.
        """
        if bool(layer.weight_scale.isnan().any()):
            raise CheckpointError(f"Tensors of the {self.what} are missing or hold NaN.")

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``[..., in]`` to logits ``[..., rows]`` in the dtype of ``x``."""
        rows = x.reshape(-1, x.shape[-1])
        if self.bits == 8:
            y = kernels.linear_w8a16(rows, layer.weight_int8, layer.weight_scale, bias)
        else:
            weight = Weight(layer.weight_packed, layer.weight_scale, layer.weight_multiplier, bias, None)
            y = FloatInput(rows).multiply(weight, x.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])


class EmbeddingMethod(HeadMethod):
    """An embedding of ``channels`` in 8 or 4 bits, and the output head that is tied to it."""

    what = "embedding"

    def __init__(self, recipe: Recipe, channels: int) -> None:
        self.bits = recipe.embedding.bits
        self.group_size = recipe.embedding.group_size
        self.signed = True
        self.rotation = None if self.bits == 8 else block_rotation(channels, recipe.embedding.blocks)

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """Rows ``[..., channels]`` of this process's tokens ``[...]``, int64, in the model's dtype."""
        index = input_.reshape(-1)
        if self.bits == 8:
            rows = int8_rows(layer.weight_int8, layer.weight_scale, index)
        else:
            weight = layer.weight_packed, layer.weight_scale, layer.weight_multiplier
            rows = packed_rows(*weight, self.rotation, index)
        return rows.to(layer.params_dtype).view(*input_.shape, rows.shape[-1])

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """See :class:`HeadMethod`."""
        return super().apply(layer, x if self.rotation is None else self.rotation(x).to(x.dtype), bias)


def quantize_embedding(model: nn.Module, places: Places, *, shared: bool) -> None:
    """Give vLLM's model an empty quantized embedding, in place.

    vLLM's models differ in whether they show their embedding to a quantization method, and tie it to the head
    by its weight. So they are built with one in 16 bits.

    Args:
        model: built, not loaded.
        places: of its modules.
        shared: whether the output head has the embedding's codes.
    """
    modules = dict(model.named_modules())
    embedding, head = (
        places.outside(f"{path}.weight").rpartition(".")[0]
        for path in (places.family.embedding, places.family.head)
    )
    layer = modules.get(embedding)
    if not isinstance(layer, VocabParallelEmbedding):  # It is on another process of the pipeline.
        return
    method = EmbeddingMethod(places.recipe, layer.embedding_dim)
    layer.quant_method = method
    del layer.weight
    method.create_weights(
        layer,
        layer.embedding_dim,
        [layer.num_embeddings_per_partition],
        layer.embedding_dim,
        layer.num_embeddings_padded,
        params_dtype=layer.params_dtype,
        weight_loader=layer.weight_loader,
    )
    if shared and isinstance(modules.get(head), ParallelLMHead):
        layer.register_parameter("bias", None)  # Which heads have.
        model.set_submodule(head, layer)
