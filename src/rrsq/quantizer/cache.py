"""Putting the quantized KV cache into a layer, and choosing the layers whose keys get more bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..models import ModelFamily, ModelSizes
from ..recipe import KVCache
from ..runtime.assemble import attach_kv_quantizer
from ..runtime.kv_cache.rope import KeyRotary
from .calibration.stream import HiddenStates
from .outcome import LayerReport

__all__ = ["SENSITIVE_KEY_BITS", "quantize_cache", "sensitive_layers"]

SENSITIVE_KEY_BITS = 8


def quantize_cache(
    layer: nn.Module,
    family: ModelFamily,
    cache: KVCache,
    sizes: ModelSizes,
    rotary: KeyRotary | None,
    means: dict[str, Tensor],
    hidden: HiddenStates | None,
    device: torch.device,
) -> float | None:
    """Attach the cache's quantizer to a layer.

    Args:
        means: float32 ``[kv_heads, head_dim]``, of keys before RoPE and of values, by ``key`` and ``value``;
            read where the recipe takes them off.
        hidden: the calibration text in front of the layer; None measures nothing.

    Returns:
        The relative error of the attention's output that the cache causes on the first batch, or None.
    """
    attention = layer.get_submodule(family.attention)
    before = None if hidden is None else _attention_output(attention, layer, hidden)
    quantizer = attach_kv_quantizer(layer, family, cache, sizes, rotary, cache.keys.bits)
    quantizer.to(device)
    for name, tensor in (("key", quantizer.keys), ("value", quantizer.values)):
        if tensor.offset is not None:
            tensor.offset.copy_(means[name])
    if before is None or hidden is None:
        return None
    after = _attention_output(attention, layer, hidden)
    return float((after - before).double().norm() / before.double().norm().clamp_min(1e-30))


def sensitive_layers(cache: KVCache, layers: list[LayerReport]) -> list[int]:
    """The layers that the cache hurts most, as many as the recipe grants 8-bit keys; sorted."""
    worst = sorted(layers, key=lambda layer: -(layer.cache_error or 0.0))
    return sorted(layer.index for layer in worst[: cache.sensitive_layers])


def _attention_output(attention: nn.Module, layer: nn.Module, hidden: HiddenStates) -> Tensor:
    """The attention's output for the first batch."""
    outputs: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handle = attention.register_forward_hook(hook)
    try:
        with torch.inference_mode():
            hidden.run(layer, hidden.batches[0])
    finally:
        handle.remove()
    return outputs[0]
