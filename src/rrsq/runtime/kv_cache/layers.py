"""Cache layers of transformers that hold quantized keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..modules.gradient import needs_gradient
from .gradient import straight_through

if TYPE_CHECKING:
    from .quantizer import KVQuantizer

__all__ = ["NoCache", "QuantizedCacheLayer", "QuantizedSlidingLayer", "token_positions"]


class QuantizedCacheLayer(DynamicLayer):
    """One layer's keys and values in 4 (or 8) bits, growing with the tokens.

    :meth:`update` stores the new tokens quantized and returns all keys and values dequantized, the new ones
    included: attention never sees a key or value that was not quantized.
    """

    def __init__(self, quantizer: KVQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.next_positions: Tensor | None = None
        self.stored: dict[str, Tensor] = {}

    @property
    def keys(self) -> Tensor | None:
        """Those stored, dequantized, ``[batch, kv_heads, tokens, head_dim]``."""
        return self.quantizer.decode(self.stored, self.dtype)[0] if self.is_initialized else None

    @keys.setter
    def keys(self, _: object) -> None:
        """What is stored is codes: what transformers sets is its own empty beginning."""

    @property
    def values(self) -> Tensor | None:
        """Those stored, dequantized, ``[batch, kv_heads, tokens, head_dim]``."""
        return self.quantizer.decode(self.stored, self.dtype)[1] if self.is_initialized else None

    @values.setter
    def values(self, _: object) -> None:
        pass

    @property
    def nbytes(self) -> int:
        """Bytes held for all cached tokens."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.stored.values())

    @straight_through
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append tokens ``[batch, kv_heads, new, head_dim]``; return all keys and values in their dtype."""
        self.dtype, self.device = key_states.dtype, key_states.device
        positions = token_positions(self.next_positions, key_states, self.get_seq_length())
        new = self.quantizer.encode(key_states, value_states, positions)
        if self.is_initialized:
            new = {name: torch.cat((self.stored[name], tensor), dim=-2) for name, tensor in new.items()}
        self._store(new)
        return self.quantizer.decode(self.stored, key_states.dtype)

    def get_seq_length(self) -> int:
        """Tokens stored."""
        return self._stored_length()

    def reset(self) -> None:
        """Forget all tokens."""
        self.stored = {}
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens; a positive number is the length to keep."""
        if not self.is_initialized or tokens_to_remove == 0:
            return
        length = tokens_to_remove if tokens_to_remove > 0 else self._stored_length() + tokens_to_remove
        self._map(lambda tensor: tensor[..., : max(length, 0), :])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch for beam search."""
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch entry."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some batch entries."""
        self._map(lambda tensor: tensor[indices])

    def offload(self) -> None:
        """Move the stored tensors to the CPU."""
        self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move the stored tensors back to the layer's device."""
        self._map(lambda tensor: tensor.to(self.device, non_blocking=True))

    def _stored_length(self) -> int:
        return self.stored["key_codes"].shape[-2] if self.is_initialized else 0

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self._store({name: change(tensor) for name, tensor in self.stored.items()})

    def _store(self, stored: dict[str, Tensor]) -> None:
        self.stored = stored
        self.is_initialized = True


class QuantizedSlidingLayer(QuantizedCacheLayer):
    """The same for sliding-window attention: no more than the window is kept.

    It counts and cuts as ``DynamicSlidingWindowLayer`` of transformers does, which masks are made for:
    ``window - 1`` tokens are stored, and :meth:`update` returns them with all new ones.

    Args:
        quantizer: of the attention.
        sliding_window: tokens a query sees, itself included.
        record_past: see :meth:`activate_past_recording`.
    """

    is_sliding = True

    def __init__(self, quantizer: KVQuantizer, sliding_window: int, *, record_past: bool = False) -> None:
        super().__init__(quantizer)
        self.sliding_window = sliding_window
        self.cumulative_length = 0
        self.record_past = record_past

    def activate_past_recording(self) -> None:
        """Keep all tokens until the next :meth:`crop`, so that it can go back (assisted generation)."""
        self.record_past = True

    @straight_through
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append tokens; return those that the new ones may see, with the new ones."""
        keys, values = super().update(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        if not self.record_past:
            self._keep_window()
        visible = self.sliding_window - 1 + key_states.shape[-2]
        return keys[..., -visible:, :], values[..., -visible:, :]

    def get_seq_length(self) -> int:
        """Tokens seen, forgotten ones included."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that a mask for ``query_length`` new tokens covers, and the first one's position."""
        seen = min(self.cumulative_length, self.sliding_window - 1)
        return seen + query_length, self.cumulative_length - seen

    def get_max_length(self) -> int:
        """The window."""
        return self.sliding_window

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.cumulative_length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens; a positive number is the length to keep.

        Raises:
            RuntimeError: tokens before them have left the window already.
        """
        keep = tokens_to_remove if tokens_to_remove > 0 else self.cumulative_length + tokens_to_remove
        removed = max(self.cumulative_length - max(keep, 0), 0)
        if removed and self.cumulative_length >= self.sliding_window and not self.record_past:
            raise RuntimeError(
                "a full sliding window cannot be cropped: call activate_past_recording() first"
            )
        if removed:
            super().crop(-removed)
            self.cumulative_length -= removed
        self._keep_window()

    def _keep_window(self) -> None:
        self._map(lambda tensor: tensor[..., max(tensor.shape[-2] - self.sliding_window + 1, 0) :, :])


class NoCache:
    """Stands where a cache would, for a forward pass that keeps none: quantizes and returns at once.

    ``codes``: with the kernels of a :class:`~.static.CodesLayer`, to the same values as it.
    """

    def __init__(self, quantizer: KVQuantizer, positions: Tensor | None, codes: bool = False) -> None:
        self.quantizer = quantizer
        self.positions = positions
        self.codes = codes

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.codes and not needs_gradient(keys) and not needs_gradient(values):
            return self.quantizer.round_trip(keys, values, self.positions)
        return self._update(keys, values)

    @straight_through
    def _update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.codes:
            return self.quantizer.round_trip(keys, values, self.positions)
        positions = token_positions(self.positions, keys, 0)
        return self.quantizer.decode(self.quantizer.encode(keys, values, positions), keys.dtype)


def token_positions(position_ids: Tensor | None, keys: Tensor, seen: int) -> Tensor:
    """Positions of new tokens as int32 ``[batch, 1, tokens, 1]``."""
    batch, _, tokens, _ = keys.shape
    if position_ids is None:
        position_ids = torch.arange(seen, seen + tokens, device=keys.device).unsqueeze(0)
    return position_ids.to(torch.int32).expand(batch, tokens)[:, None, :, None]
