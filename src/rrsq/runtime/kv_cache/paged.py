"""Continuous batching of transformers: its paged cache holds keys and values in 16 bits.

What it stores is not quantized at all, which would cost quality and save nothing. Its attention is
transformers' own, which is switched back when it ends.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

from .attention import ATTENTION, attention_of_transformers, use_attention

__all__ = ["PagedBatching"]


class PagedBatching:
    """Stands in the place of a model's ``init_continuous_batching``, which ``generate_batch`` calls too.

    Args:
        model: of transformers, loaded, whose KV cache is quantized.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.said = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The manager that transformers makes."""
        if not self.said:
            self.said = True
            warnings.warn(
                "The KV cache stays in 16 bits: continuous batching has one of its own. generate() has"
                " quantized ones.",
                stacklevel=2,
            )
        config = self.model.config.get_text_config()
        ours = config._attn_implementation == ATTENTION
        if ours:
            config._attn_implementation = attention_of_transformers(config)
        try:
            manager = type(self.model).init_continuous_batching(self.model, *args, **kwargs)
        except BaseException:
            if ours:
                use_attention(config)
            raise
        if ours:
            manager.stop = functools.partial(_stop, manager, config)
        return manager


def _stop(manager: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return type(manager).stop(manager, *args, **kwargs)
    finally:
        use_attention(config)
