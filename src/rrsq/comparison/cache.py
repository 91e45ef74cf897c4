"""Another KV cache for a loaded model: weights and activations stay as they are."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rrsq.models import family_for
from rrsq.quantizer.cache import calibrate_cache
from rrsq.quantizer.calibration.cache_statistics import CACHE_MEANS, collect_cache_means
from rrsq.recipe import KVCache
from rrsq.runtime.assemble import attach_kv_quantizer, key_rotary
from rrsq.runtime.decoding import attach_decoder, detach_decoder
from rrsq.storage import storage_errors

__all__ = [
    "MEAN_WINDOWS",
    "CacheMeans",
    "measure_cache_means",
    "read_cache_means",
    "replace_cache",
    "write_cache_means",
]

# Of the calibration text. Means of so many tokens move no longer; what is left of keys is quantized anyway.
MEAN_WINDOWS = 16
CacheMeans = dict[str, Tensor]
"""float32 ``[layers, kv_heads, head_dim]`` by name: those of keys and queries in :data:`CACHE_MEANS`."""
_NAMES = tuple(name for name in CACHE_MEANS if name != "value")  # Checkpoints may have values rotated.


def replace_cache(model: Any, cache: KVCache | None, means: CacheMeans | None) -> None:
    """Give each attention of a loaded model another quantized KV cache, or none.

    Args:
        model: of transformers, quantized or not.
        cache: to attach; None leaves keys and values in 16 bits.
        means: of the model in full precision, for a cache with constants from calibration.
    """
    family = family_for(model.config)
    sizes = family.sizes(model.config)
    place = model.get_input_embeddings().weight.device
    detach_decoder(model)
    for index, layer in enumerate(model.get_submodule(family.layers)):
        attention = layer.get_submodule(family.attention)
        if hasattr(attention, "kv_quantizer"):
            attention.kv_quantizer.detach(attention)
        if cache is None:
            continue
        rotary = key_rotary(model, family, index)
        quantizer = attach_kv_quantizer(layer, family, cache, sizes, rotary, cache.keys.bits)
        if means is not None:
            calibrate_cache(quantizer, {name: mean[index] for name, mean in means.items()}, rotary)
        quantizer.to(place)
    attach_decoder(model)


@torch.inference_mode()
def measure_cache_means(model: Any, windows: Tensor) -> CacheMeans:
    """Means of keys and queries, on the CPU.

    They are those of every checkpoint of the model too: no rotation is folded into keys.

    Args:
        model: in full precision.
        windows: int64 ``[samples, tokens]``, of which the first :data:`MEAN_WINDOWS` run.
    """
    family = family_for(model.config)
    place = model.get_input_embeddings().weight.device
    with ExitStack() as stack:
        means = [
            stack.enter_context(
                collect_cache_means(layer.get_submodule(family.attention), key_rotary(model, family, index))
            )
            for index, layer in enumerate(model.get_submodule(family.layers))
        ]
        for window in windows[:MEAN_WINDOWS]:
            model.get_decoder()(input_ids=window[None].to(place), use_cache=False)
    names = [name for name in _NAMES if all(name in each for each in means)]
    return {name: torch.stack([each[name].mean().cpu() for each in means]) for name in names}


def write_cache_means(path: Path, means: CacheMeans, made_of: str) -> None:
    """Keep them, with a digest of what they were made of."""
    with storage_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(means, partial, metadata={"made_of": made_of})
        partial.replace(path)


def read_cache_means(path: Path, made_of: str) -> CacheMeans | None:
    """What was kept, if it was made of the same and is whole."""
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("made_of") != made_of:
                return None
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError):
        return None
