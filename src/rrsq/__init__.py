"""rrsq: real INT4 weights, activations and KV cache for Hugging Face LLMs, with Rotated Runtime Smooth.

``rrsq.quantize`` makes a checkpoint, ``rrsq.load`` loads it, ``rrsq.evaluate`` measures it, ``rrsq.export``
writes it for other engines, and ``rrsq.KVCache`` is a cache for one's own loop (docs/python.md).
``import rrsq`` lets ``transformers.AutoModelForCausalLM.from_pretrained`` load rrsq checkpoints, and PEFT
train LoRA adapters beside them; it imports none of torch, transformers and PEFT itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._register import register

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

    from .api import evaluate, export, quantize
    from .runtime.kv_cache.cache import KVCache

__all__ = ["KVCache", "__version__", "evaluate", "export", "load", "quantize"]
__version__ = "0.1.0"

register()


def load(
    path: str | Path, *, device: str = "auto", dtype: str | torch.dtype = "auto", **kwargs: Any
) -> PreTrainedModel:
    """Load a checkpoint (or any causal language model) ready to run.

    Args:
        path: checkpoint folder or Hub id.
        device: ``auto`` (CUDA if there is one), ``cpu``, ``cuda`` or ``cuda:N``; not with ``device_map``.
        dtype: of what is not quantized: ``auto``, ``bfloat16``, ``float16`` or ``float32``, or torch's.
        kwargs: passed on to ``from_pretrained``. With ``device_map`` the model is spread over devices, and
            what does not fit is offloaded, packed weights included (``offload_buffers=True``).

    Raises:
        UsageError: an argument is not what it must be, or ``device`` and ``device_map`` are both given.
        RRSQError: the folder does not exist, is damaged or of an unknown format.
    """
    from .runtime.format.loading import load_model

    return load_model(path, device=device, dtype=dtype, **kwargs)


def __getattr__(name: str) -> Any:
    """The functions of :mod:`rrsq.api` and ``KVCache``, imported when they are first asked for."""
    if name == "KVCache":
        from .runtime.kv_cache.cache import KVCache

        return KVCache
    if name not in ("evaluate", "export", "quantize"):
        raise AttributeError(f"module 'rrsq' has no attribute '{name}'")
    from . import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
