"""Putting the quantized KV cache into a layer, and choosing the layers whose keys get more bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..models import ModelFamily, ModelSizes
from ..recipe import KVCache
from ..runtime.assemble import attach_kv_quantizer
from ..runtime.kv_cache.quantizer import KVQuantizer
from ..runtime.kv_cache.rope import KeyRotary
from .calibration.cache_statistics import balance_keys
from .calibration.stream import HiddenStates
from .outcome import LayerReport

__all__ = ["SENSITIVE_KEY_BITS", "calibrate_cache", "quantize_cache", "sensitive_layers"]

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
        means: see :func:`.calibration.cache_statistics.collect_cache_means`; the recipe says which are read.
        hidden: the calibration text in front of the layer; None measures nothing.

    Returns:
        The relative error of the attention's output that the cache causes on the first batch, or None.
    """
    attention = layer.get_submodule(family.attention)
    before = None if hidden is None else _attention_output(attention, layer, hidden)
    quantizer = attach_kv_quantizer(layer, family, cache, sizes, rotary, cache.keys.bits)
    quantizer.to(device)
    calibrate_cache(quantizer, means, rotary)
    if before is None or hidden is None:
        return None
    after = _attention_output(attention, layer, hidden)
    return float((after - before).double().norm() / before.double().norm().clamp_min(1e-30))


def calibrate_cache(quantizer: KVQuantizer, means: dict[str, Tensor], rotary: KeyRotary | None) -> None:
    """Give a quantizer the constants that its schemes ask for; arguments as of :func:`quantize_cache`."""
    keys, values = quantizer.keys, quantizer.values
    for name, offset in (("key", keys.offset), ("sink", keys.sink), ("value", values.offset)):
        if offset is not None:
            offset.copy_(means[name])
    if keys.balance is not None:
        keys.balance.copy_(balance_keys(means, rotary, centred=keys.offset is not None))


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
