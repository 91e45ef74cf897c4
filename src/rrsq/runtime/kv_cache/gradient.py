"""Gradients through a quantized cache, for adapters that are trained."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..modules.gradient import StraightThrough, needs_gradient

__all__ = ["straight_through"]

_Update = Callable[..., tuple[Tensor, Tensor]]


def straight_through(update: _Update) -> _Update:
    """Let a cache's ``update`` pass gradients to the new tokens, as if nothing had been rounded.

    Rounding has no useful gradient (arXiv 1308.3432). Keys and values of earlier calls are stored as
    integers, with nothing before them, and get none.

    Args:
        update: of new keys and values ``[batch, kv_heads, new, head_dim]``, returns those of all tokens, with
            the new ones last.
    """

    @functools.wraps(update)
    def with_gradient(
        self: Any, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not (needs_gradient(keys) or needs_gradient(values)):
            return update(self, keys, values, *args, **kwargs)
        with torch.no_grad():
            all_keys, all_values = update(self, keys.detach(), values.detach(), *args, **kwargs)
        return _passed_on(keys, all_keys), _passed_on(values, all_values)

    return with_gradient


def _passed_on(new: Tensor, everything: Tensor) -> Tensor:
    if not needs_gradient(new):
        return everything
    return StraightThrough.apply(new, lambda _: everything, lambda grad: grad[..., -new.shape[-2] :, :])
