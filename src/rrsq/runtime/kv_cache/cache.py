"""A quantized cache for those who run a model's forward pass themselves."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import DynamicCache

from ...errors import UsageError
from .quantizer import KVQuantizer

__all__ = ["KVCache"]


class KVCache(DynamicCache):
    """An empty KV cache of a quantized model, for ``model(..., past_key_values=cache)``.

    On a GPU it has room for ``max_length`` tokens from the first forward pass on, which says how many
    sequences there are; beyond them it moves to larger ones. On a CPU it grows by what it is given.
    ``reset()`` empties it for the next text, ``crop(n)`` keeps the first ``n`` tokens.

    Args:
        model: a causal language model of transformers, loaded from a checkpoint of rrsq.
        max_length: tokens of a sequence, prompt and continuation.

    Raises:
        UsageError: ``max_length`` is not positive, or the model's KV cache is not quantized.
    """

    def __init__(self, model: Any, max_length: int) -> None:
        if max_length < 1:
            raise UsageError(f"max_length is {max_length}. It has to be at least 1.")
        if not any(isinstance(module, KVQuantizer) for module in model.modules()):
            raise UsageError(
                "The KV cache of this model is not quantized. Use transformers' DynamicCache or StaticCache."
            )
        super().__init__(config=model.config)
        self.max_length = max_length
        for layer in self.layers:
            # As in a StaticCache; what takes the layer's place has room for so many.
            layer.max_cache_len = max_length
