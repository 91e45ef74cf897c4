"""The attention function of models with a quantized KV cache: transformers calls it by its name.

Of keys that are tensors it is transformers' ``sdpa``. Of :class:`~.static.CachedTokens` it decodes from the
codes; where there are many new tokens, it reads keys and values out once, in 16 bits, for ``sdpa``. That has
no soft-capping (arXiv 2408.00118): with it there stands what transformers' ``eager`` computes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .static import CachedTokens

__all__ = ["ATTENTION", "attention_of_transformers", "cap_attention", "use_attention"]

ATTENTION = "rrsq"
_MOST_LOGITS = 2**28
"""That are in memory at once where they are soft-capped."""


def use_attention(config: Any) -> None:
    """Let a model use the attention of rrsq where it has the one that transformers gives it by itself."""
    own = "sdpa", attention_of_transformers(config)  # See cap_attention.
    if config._attn_implementation in own and not config.output_attentions:
        _register()
        config._attn_implementation = ATTENTION


def attention_of_transformers(config: Any) -> str:
    """The one that transformers takes for a model unless it is told another."""
    return "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"


def cap_attention(model: Any) -> None:
    """Let a model with soft-capped logits have an attention that caps them.

    Transformers 5.17 takes ``sdpa`` for it unless it is told another, which leaves the capping out.
    """
    config = model.config.get_text_config()
    if config._attn_implementation == "sdpa" and attention_of_transformers(config) != "sdpa":
        model.set_attn_implementation("eager")


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
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """``query`` ``[batch, heads, tokens, head_dim]`` to ``[batch, tokens, heads, head_dim]``."""
    if isinstance(key, CachedTokens):
        layer, quantizer = key.layer, key.layer.quantizer
        if key.decodes(attention_mask) and not kwargs.get("output_attentions"):
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            window = layer.sliding_window or 0
            queries, shift = query.transpose(1, 2), layer.shift
            out = quantizer.attend(
                layer.pages,
                queries,
                layer.used,
                key.added,
                attention_mask,
                shift,
                scale,
                softcap or 0.0,
                window,
                layer.table,
            )
            return out, None
        first, seen = key.first, key.fresh
        if seen is None:
            seen = quantizer.read(layer.pages, query, first, layer.tokens, layer.shift, layer.table)
        key, value = seen
        if attention_mask is not None:
            attention_mask = attention_mask[..., first : layer.tokens]
    assert isinstance(value, Tensor)
    if softcap:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return _capped(module, query, key, value, attention_mask, scale, softcap, **kwargs)
    from transformers.integrations.sdpa_attention import sdpa_attention_forward  # See _register.

    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def _capped(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with soft-capped logits, some queries at a time; its weights too where they are asked for."""
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    batch, heads, tokens, _ = query.shape
    total = key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is None and causal and tokens > 1:
        mask = torch.ones(tokens, total, dtype=torch.bool, device=query.device).tril(total - tokens)
        mask = mask[None, None]
    wanted = bool(kwargs.get("output_attentions"))
    step = tokens if wanted else max(_MOST_LOGITS // (batch * heads * total), 1)
    parts = []
    for first in range(0, tokens, step):
        logits = query[:, :, first : first + step] @ key.transpose(2, 3) * scaling
        logits = torch.tanh(logits / softcap) * softcap
        if mask is not None:
            chosen = mask if mask.shape[2] == 1 else mask[:, :, first : first + step]
            if chosen.dtype == torch.bool:
                lowest = torch.finfo(logits.dtype).min
                chosen = torch.where(chosen, torch.zeros((), dtype=logits.dtype, device=mask.device), lowest)
            logits = logits + chosen
        weights = torch.softmax(logits, -1, dtype=torch.float32).to(query.dtype)
        weights = nn.functional.dropout(weights, dropout, module.training)
        parts.append(weights @ value)
    out = torch.cat(parts, 2) if len(parts) > 1 else parts[0]
    return out.transpose(1, 2).contiguous(), weights if wanted else None
