"""What calibration measures of an attention for its KV cache: means of keys, values and squared queries."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.kv_cache.layers import token_positions
from ...runtime.kv_cache.rope import KeyRotary
from .statistics import MeanStatistics

__all__ = ["CACHE_MEANS", "balance_keys", "collect_cache_means"]

CACHE_MEANS = ("key", "sink", "value", "key_square", "query_square")
"""Names of the means: see :func:`collect_cache_means`."""
_OBSERVED = "rrsq_observed_"
_LARGEST_POWER = 8
"""Of two, in factors of the balance: channels may be dead on the calibration text."""


@contextmanager
def collect_cache_means(
    attention: nn.Module, rotary: KeyRotary | None
) -> Iterator[dict[str, MeanStatistics]]:
    """While open, gather means over tokens of an attention that is run without a cache.

    They are measured where a cache and an attention function would take keys, values and queries, so that
    norms of heads and fused projections need not be known. All are ``[kv_heads, head_dim]``: ``key``, before
    RoPE, which is undone; ``sink``, of the keys at position 0, the first of each window; ``value``;
    ``key_square``, of squared keys before RoPE; ``query_square``, of squared queries after RoPE, over the
    heads that share a key too. There is no ``query_square`` in the end of an attention that does not take its
    function from transformers.
    """
    observer = _Observer(rotary)
    config: Any = getattr(attention, "config", SimpleNamespace())
    implementation = getattr(config, "_attn_implementation", None)
    handle = attention.register_forward_pre_hook(observer.before_attention, with_kwargs=True)
    attention._rrsq_observer = observer  # type: ignore[assignment]
    # Attentions of one configuration may be observed at once.
    if implementation is not None and not implementation.startswith(_OBSERVED):
        config._attn_implementation = _observed_implementation(implementation)
    try:
        yield observer.means
    finally:
        config._attn_implementation = implementation
        del attention._rrsq_observer
        handle.remove()
        if not observer.means["query_square"].tokens:
            del observer.means["query_square"]


class _Observer:
    """Stands where a cache would, and hands keys and values back as they came."""

    def __init__(self, rotary: KeyRotary | None) -> None:
        self.rotary = rotary
        self.means = {name: MeanStatistics() for name in CACHE_MEANS}
        self.position_ids: Tensor | None = None

    def before_attention(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.position_ids = kwargs.get("position_ids")
        return args, {**kwargs, "past_key_values": self}

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        before = keys.float()
        if self.rotary is not None:
            positions = self.rotary.mark(token_positions(self.position_ids, keys, 0))
            before = self.rotary.undo(before, positions)
        before = before.transpose(1, 2)
        self.means["key"].add(before)
        self.means["key_square"].add(before.square())
        self.means["sink"].add(before[:, :1])
        self.means["value"].add(values.transpose(1, 2))
        return keys, values

    def observe(self, query: Tensor, kv_heads: int) -> None:
        """``query`` ``[batch, heads, tokens, head_dim]``."""
        square = query.detach().float().square().unflatten(1, (kv_heads, -1)).mean(2)
        self.means["query_square"].add(square.transpose(1, 2))


@functools.cache
def _observed_implementation(implementation: str) -> str:
    """The name of an attention that computes what ``implementation`` does and shows the queries."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = _OBSERVED + implementation
    function = ALL_ATTENTION_FUNCTIONS.get(implementation)

    def attention(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        observer = getattr(module, "_rrsq_observer", None)
        if observer is not None:
            observer.observe(query, key.shape[1])
        # What a family calls "eager" is a function of its own.
        own: Callable[..., Any] = function or sys.modules[type(module).__module__].eager_attention_forward
        return own(module, query, key, *args, **kwargs)

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name


def balance_keys(means: dict[str, Tensor], rotary: KeyRotary | None, *, centred: bool = True) -> Tensor:
    """``D`` of ``q · k = (q D⁻¹) · (k D)``, such that rounding ``(k - mean) D H`` harms the logits least.

    Its error is in proportion to ``E‖(k - mean) D‖² E‖q D⁻¹‖²``, which is least for ``D_c⁴ = E q_c² / Var
    k_c``; of the two channels that RoPE turns it is the same. Powers of two, by which 16-bit numbers are
    multiplied and divided exactly.

    Args:
        means: see :func:`collect_cache_means`.
        rotary: the layer's, or None.
        centred: the mean key is taken off; else ``E k_c²`` stands for the variance.

    Returns:
        float32 ``[kv_heads, head_dim]``, of geometric mean near 1; 1 where keys or queries are zero or not
        known.
    """
    if "query_square" not in means:
        return torch.ones_like(means["key_square"])
    queries = means["query_square"].double()
    keys = means["key_square"].double()
    if centred:
        keys = (keys - means["key"].double().square()).clamp_min(0)
    if rotary is not None:
        pairs = rotary.frequency.shape[0]
        queries, keys = (_shared(square, pairs) for square in (queries, keys))
    known = (queries > 0) & (keys > 0)
    power = torch.where(known, (queries.log2() - keys.log2()) / 4, torch.nan)
    power = (power - power.nanmean(1, keepdim=True)).nan_to_num(0.0)
    return power.round().clamp(-_LARGEST_POWER, _LARGEST_POWER).exp2().float()


def _shared(square: Tensor, pairs: int) -> Tensor:
    """The mean of the channels ``(c, c + pairs)`` in both; those beyond are left alone."""
    first, second, rest = square.split((pairs, pairs, square.shape[1] - 2 * pairs), dim=1)
    both = (first + second) / 2
    return torch.cat((both, both, rest), dim=1)
