"""The recipe's KV cache in vLLM: which layers have it, and their calibrated offsets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from ..errors import UsageError
from ..models import ModelFamily
from ..runtime.kv_cache.quantizer import KVQuantizer
from .attention import QuantizedCacheBackend
from .pages import PageLayout, QuantizedFullSpec, QuantizedSlidingSpec

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheSpec

    from .config import RRSQConfig

__all__ = ["CacheMethod", "has_quantized_cache", "load_offset", "quantized_cache", "register_cache"]


def register_cache() -> None:
    """Make vLLM know the attention backend, by the name that it has for those of others."""
    path = f"{QuantizedCacheBackend.__module__}.{QuantizedCacheBackend.__qualname__}"
    register_backend(AttentionBackendEnum.CUSTOM, path)


@contextmanager
def quantized_cache(
    vllm_config: VllmConfig, family: ModelFamily, described: nn.Module
) -> Iterator[dict[int, KVQuantizer]]:
    """While a model is built, have its attentions be rrsq's if the checkpoint's KV cache is quantized.

    ``--kv-cache-dtype`` other than ``auto`` wins over the checkpoint. Models that are built later, such as
    one that drafts, get what vLLM chooses for them.

    Args:
        vllm_config: its attention backend is set and set back.
        family: of the model.
        described: the checkpoint's model in transformers, on the meta device.

    Yields:
        The quantizer of each layer, for all of its heads; empty where vLLM keeps the cache in its own way.

    Raises:
        UsageError: another attention backend was asked for, or something that rrsq's cannot do.
    """
    found = _quantizers(family, described)
    if not found or vllm_config.cache_config.cache_dtype != "auto":
        yield {}
        return
    attention = vllm_config.attention_config
    other = "Choose a cache of vLLM's own with --kv-cache-dtype bfloat16."
    before = attention.backend
    if before not in (None, AttentionBackendEnum.CUSTOM) or attention.backend_per_kind:
        name = getattr(before, "name", None) or ", ".join(map(str, attention.backend_per_kind))
        raise UsageError(
            f"The checkpoint's KV cache is in 4 bits, which the attention backend {name} cannot read. Leave"
            f" --attention-backend out. {other}"
        )
    head_dim = next(iter(found.values())).keys.head_dim
    if not QuantizedCacheBackend.supports_head_size(head_dim):
        raise UsageError(
            f"The model's heads have {head_dim} channels; the kernels of the 4-bit KV cache take even numbers"
            f" up to 256. {other}"
        )
    attention.backend = AttentionBackendEnum.CUSTOM
    try:
        yield found
    except ValueError as error:
        if "Selected backend" not in str(error):
            raise
        raise UsageError(f"The 4-bit KV cache cannot be used here: {error} {other}") from error
    finally:
        attention.backend = before


def _quantizers(family: ModelFamily, described: nn.Module) -> dict[int, KVQuantizer]:
    layers: Any = described.get_submodule(family.layers)
    attentions = (layer.get_submodule(family.attention) for layer in layers)
    found = ((index, getattr(module, "kv_quantizer", None)) for index, module in enumerate(attentions))
    return {index: quantizer for index, quantizer in found if quantizer is not None}


def has_quantized_cache(layer: nn.Module) -> bool:
    """Whether a layer is an attention for which vLLM has chosen :class:`QuantizedCacheBackend`."""
    return isinstance(layer, Attention) and issubclass(layer.attn_backend, QuantizedCacheBackend)


class CacheMethod(BaseKVCacheMethod):
    """Gives an attention of vLLM its quantizer and its pages.

    Raises:
        UsageError: the attention is no layer of a checkpoint with a quantized cache.
    """

    def __init__(self, quant_config: RRSQConfig, prefix: str) -> None:
        super().__init__(quant_config)
        self.index = extract_layer_index(prefix)
        quantizer = quant_config.quantizers.get(self.index)
        if quantizer is None:
            raise UsageError(f"The checkpoint says nothing of a KV cache in '{prefix}'.")
        self.whole = quantizer
        self.layers = quant_config.cached_layers

    def create_weights(self, layer: Any) -> None:
        """The quantizer of the key heads that this process has, with offsets of zero."""
        from vllm.config import get_current_vllm_config

        longest = int(get_current_vllm_config().model_config.max_model_len)
        quantizer = layer.cache_quantizer = self.whole.shard(layer.num_kv_heads, longest)
        layer.impl.quantizer = quantizer
        layout = PageLayout.of(quantizer)
        layer.attn_backend = QuantizedCacheBackend.for_layout(layout)
        layer.get_kv_cache_spec = lambda vllm_config: _spec(layer, layout, vllm_config)
        self.layers[self.index] = layer

    def process_weights_after_loading(self, layer: Any) -> None:
        """Nothing: offsets are used as they are."""

    def apply(self, *args: Any, **kwargs: Any) -> Tensor:
        """Not called: an attention is no linear."""
        raise NotImplementedError


def _spec(layer: Any, layout: PageLayout, vllm_config: VllmConfig) -> KVCacheSpec:
    """What vLLM is told of a layer's pages."""
    common: dict[str, Any] = {
        "block_size": vllm_config.cache_config.block_size,
        "num_kv_heads": layer.num_kv_heads,
        "head_size": layer.head_size,
        "dtype": torch.uint8,
        "token_bytes": layout.token_bytes,
    }
    window = layer.sliding_window
    if window is None:
        return QuantizedFullSpec(**common)
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        return QuantizedFullSpec(**common, sliding_window=window)
    return QuantizedSlidingSpec(**common, sliding_window=window)


def load_offset(layer: Any, path: str, offset: Tensor) -> None:
    """Put a calibrated offset ``[all kv_heads, head_dim]`` into an attention of vLLM.

    Args:
        layer: the attention.
        path: of the offset in the checkpoint's quantizer, ``keys.offset`` or ``values.offset``.
        offset: of all heads; those of this process are taken.
    """
    buffer = layer.cache_quantizer.get_buffer(path)
    total, own = offset.shape[0], buffer.shape[0]
    rank, world = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    # With more processes than key heads, several have the same one.
    first = rank * own if total >= world else rank * total // world
    buffer.copy_(offset.narrow(0, first, own))
