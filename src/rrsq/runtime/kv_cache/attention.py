"""The attention function of models with a quantized KV cache: transformers calls it by its name.

Of keys that are tensors it is transformers' ``sdpa``. Of :class:`~.static.CachedTokens` it decodes from the
codes; where there are many new tokens, it reads keys and values out once, in 16 bits, for ``sdpa``.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from .static import CachedTokens

__all__ = ["ATTENTION", "use_attention"]

ATTENTION = "rrsq"


def use_attention(config: Any) -> None:
    """Let a model whose attention would be transformers' ``sdpa`` use that of rrsq."""
    if config._attn_implementation == "sdpa":
        _register()
        config._attn_implementation = ATTENTION


@functools.cache
def _register() -> None:
    # Not at the top: transformers imports this module while it imports its models.
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | CachedTokens,
    value: Tensor | CachedTokens,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``query`` ``[batch, heads, tokens, head_dim]`` to ``[batch, tokens, heads, head_dim]``."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if isinstance(key, CachedTokens):
        layer, quantizer = key.layer, key.layer.quantizer
        if key.decodes(attention_mask):
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            softcap, window = kwargs.get("softcap") or 0.0, layer.sliding_window or 0
            queries, shift = query.transpose(1, 2), layer.shift
            out = quantizer.attend(
                layer.pages,
                queries,
                layer.used,
                key.added,
                attention_mask,
                shift,
                scale,
                softcap,
                window,
                layer.table,
            )
            return out, None
        first, key, value = key.read(query)
        if attention_mask is not None:
            attention_mask = attention_mask[..., first : layer.tokens]
    assert isinstance(value, Tensor)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
