"""Cache layers that attention reads as codes: preallocated, written in place, for kernels and graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ...kernels import CachePages
from ...kernels.cache_attend import QUERIES

if TYPE_CHECKING:
    from .quantizer import KVQuantizer

__all__ = ["BEYOND_WINDOW", "CachedTokens", "CodesLayer", "Storage", "enough", "rows_of"]

BEYOND_WINDOW = 256
"""Tokens that a sliding layer holds beyond its window. No more can be cropped. The padding of a prompt that
is captured (:mod:`rrsq.runtime.prefill`) and the queries that read codes at once are no more either."""
_STEP = 64
"""Of the rows of a sliding layer."""


def enough(tokens: int) -> int:
    """A capacity for so many tokens with room for more, in steps that are few over a long text."""
    capacity = 512
    while capacity < tokens:
        capacity *= 2
    return capacity if capacity <= 4096 or tokens > capacity * 3 // 4 else capacity * 3 // 4


def rows_of(window: int | None, capacity: int) -> int:
    """Tokens of a sequence that a layer holds; if fewer than ``capacity``, new ones overwrite the oldest."""
    if window is None:
        return capacity
    return min(-(-(window + BEYOND_WINDOW) // _STEP) * _STEP, capacity)


class Storage:
    """What the layers of one cache store, at addresses that a CUDA graph can hold on to.

    Token ``n`` of a sequence lies in row ``n % rows`` of the sequence's block.

    Args:
        quantizers: of the layers.
        windows: of the layers, None where a query sees all tokens.
        batch: sequences.
        capacity: tokens of a sequence.
        device: of the tensors.

    Attributes:
        pages: of each layer, one block a sequence, with as many rows as :func:`rows_of` says.
        tables: of each layer, the block table by which tokens are read, int32 ``[batch, turns]``; None where
            there is a row for each token.
        used: int32 ``[layers]``, tokens stored before a forward pass.
        used_of: of each layer, ``[1]`` of ``used``; making one at a call would cost as much as a launch.
        shift: int32 ``[batch]``, position of the first token of each sequence.
        together: ``used`` is raised for all layers at the end of a forward pass, not by each layer.
        graphs: of a :class:`~rrsq.runtime.decoding.Decoder` and its prompts.
        structure: of the model that they were captured of, None where nothing can be.
        prompts: a forward pass is running that may be captured if it is of prompts.
    """

    def __init__(
        self,
        quantizers: tuple[KVQuantizer, ...],
        windows: tuple[int | None, ...],
        batch: int,
        capacity: int,
        device: torch.device,
    ) -> None:
        self.windows, self.batch, self.capacity, self.device = windows, batch, capacity, device
        rows = [rows_of(window, capacity) for window in windows]
        with torch.inference_mode(False):
            self.pages = [
                quantizer.pages(batch, count, device)
                for quantizer, count in zip(quantizers, rows, strict=True)
            ]
            blocks = torch.arange(batch, dtype=torch.int32, device=device).unsqueeze(1)
            tables = {count: blocks.repeat(1, -(-capacity // count)) for count in set(rows) - {capacity}}
            self.used = torch.zeros(len(quantizers), dtype=torch.int32, device=device)
            self.shift = torch.zeros(batch, dtype=torch.int32, device=device)
            self.used_of = _one_by_one(self.used)
        self.tables = [tables.get(count) for count in rows]
        self.together = self.prompts = False
        self.graphs: dict[Any, Any] = {}
        self.structure: tuple[Any, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' pages."""
        tensors = (tensor for pages in self.pages for tensor in pages if tensor is not None)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def fits(self, batch: int, tokens: int, device: torch.device) -> bool:
        """Whether a cache of this batch and length can use it."""
        return self.batch == batch and self.capacity >= tokens and self.device == device

    def __deepcopy__(self, memo: dict[int, Any]) -> Storage:
        new = copy.copy(self)
        new.pages = [pages.clone() for pages in self.pages]
        new.used, new.shift, new.graphs = self.used.clone(), self.shift.clone(), {}
        new.used_of = _one_by_one(new.used)
        return new


def _one_by_one(x: Tensor) -> list[Tensor]:
    return [x[index : index + 1] for index in range(x.shape[0])]


class CodesLayer(DynamicLayer):
    """One layer's keys and values in 4 (or 8) bits, which attention reads as they are.

    :meth:`update` returns no tensors but a :class:`CachedTokens`, which the attention function of rrsq takes
    for keys (:mod:`.attention`). It counts all tokens, also those before the window that a sliding layer has
    overwritten: masks have a column for each.

    Args:
        quantizer: of the attention.
        sliding_window: tokens a query sees, itself included; None: all.
        storage: shared with the cache's other layers, or None: one of its own, when tokens come.
        index: of the layer in the storage.
        reserved: tokens that there is to be room for from the start.

    Attributes:
        tokens: seen.
    """

    def __init__(
        self,
        quantizer: KVQuantizer,
        sliding_window: int | None = None,
        storage: Storage | None = None,
        index: int = 0,
        reserved: int = 0,
    ) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.record_past = False
        self.reserved = reserved
        self.next_positions: Tensor | None = None
        self.tokens = self._written = 0
        self.storage = storage
        self.index = index

    @property
    def keys(self) -> Tensor | None:
        """All keys, or those of the window, dequantized, ``[batch, kv_heads, tokens, head_dim]``."""
        return self._read()[0] if self.is_initialized else None

    @keys.setter
    def keys(self, _: object) -> None:
        """What is stored is codes: what transformers sets is its own empty beginning."""

    @property
    def values(self) -> Tensor | None:
        """All values, or those of the window, dequantized, ``[batch, kv_heads, tokens, head_dim]``."""
        return self._read()[1] if self.is_initialized else None

    @values.setter
    def values(self, _: object) -> None:
        pass

    @property
    def pages(self) -> CachePages:
        """Where the tokens are."""
        assert self.storage is not None
        return self.storage.pages[self.index]

    @property
    def table(self) -> Tensor | None:
        """By which :attr:`pages` are read."""
        assert self.storage is not None
        return self.storage.tables[self.index]

    @property
    def used(self) -> Tensor:
        """int32 ``[1]``: tokens seen, of which a running forward pass may be one ahead."""
        assert self.storage is not None
        return self.storage.used_of[self.index]

    @property
    def shift(self) -> Tensor:
        """int32 ``[batch]``: position of the first token of each sequence."""
        assert self.storage is not None
        return self.storage.shift

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens stored, without the room for more."""
        if self.storage is None:
            return 0
        all_rows = sum(x.numel() * x.element_size() for x in self.pages if x is not None)
        return all_rows * self._held // self.pages.block_size

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Append tokens ``[batch, kv_heads, new, head_dim]``; both results are :class:`CachedTokens`."""
        batch, _, new, _ = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        if self.storage is None or not self.storage.fits(batch, self.tokens + new, key_states.device):
            capacity = enough(max(self.tokens + new, self.reserved))
            windows = (self.sliding_window,)
            self.attach(Storage((self.quantizer,), windows, batch, capacity, key_states.device), 0)
            self.used.fill_(self.tokens)
        storage = self.storage
        assert storage is not None
        if self.tokens == 0 and self.index == 0:
            if self.next_positions is None:
                storage.shift.zero_()
            else:
                storage.shift.copy_(self.next_positions[:, -1].expand(batch) - (new - 1))
        fresh, used = None, storage.used_of[self.index]
        if self.sliding_window is not None and self._overwrites(new):
            fresh = self._see_and_append(key_states, value_states)
        else:
            self.quantizer.append(self.pages, key_states, value_states, used, storage.shift)
        self.tokens += new
        self.is_initialized = True
        if not storage.together:
            used.add_(new)
        tokens = CachedTokens(self, new, fresh)
        return tokens, tokens

    def _overwrites(self, new: int) -> bool:
        """Whether so many new tokens would overwrite what they see."""
        return self.tokens + new - self.first(self.tokens) > self.pages.block_size

    def _see_and_append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new tokens that overwrite what they see of the layer; which is returned."""
        pages, new, shift = self.pages, keys.shape[2], self.shift
        rows, used = pages.block_size, self.used
        older = self.quantizer.read(pages, keys, self.first(self.tokens), self.tokens, shift, self.table)
        newer = self.quantizer.stored_and_read(keys, values, used + shift)
        if new > rows:
            keys, values, used = keys[:, :, -rows:], values[:, :, -rows:], used + (new - rows)
        self.quantizer.append(pages, keys, values, used, shift)
        return torch.cat((older[0], newer[0]), 2), torch.cat((older[1], newer[1]), 2)

    def first(self, seen: int) -> int:
        """The first token that the one behind ``seen`` others sees."""
        return 0 if self.sliding_window is None else max(seen - self.sliding_window + 1, 0)

    def attach(self, storage: Storage, index: int) -> None:
        """Keep the tokens in another storage from now on, whose ``used`` the caller sets."""
        old = self.storage
        if old is not None and self.tokens:
            for new, tensor in zip(storage.pages[index], self.pages, strict=True):
                if new is not None and tensor is not None:
                    held = min(self._held, new.shape[2])
                    new[:, :, :held] = tensor[:, :, :held]
            storage.shift.copy_(old.shift)
        self.storage, self.index = storage, index

    def filled(self, tokens: int, written: int, dtype: torch.dtype) -> None:
        """Know of tokens that a graph has written, padding included ``written``; keys were in ``dtype``."""
        assert self.storage is not None
        self.tokens, self.dtype, self.device = tokens, dtype, self.storage.device
        self._written = written
        self.is_initialized = True

    def _read(self) -> tuple[Tensor, Tensor]:
        assert self.storage is not None
        like = torch.empty(
            (self.storage.batch, self.quantizer.keys.head_dim), dtype=self.dtype, device=self.storage.device
        )
        overwritten = max(self.tokens, self._written) > self.pages.block_size
        first = self.first(self.tokens) if overwritten else 0
        return self.quantizer.read(self.pages, like, first, self.tokens, self.shift, self.table)

    @property
    def _held(self) -> int:
        """Rows that hold tokens."""
        return min(self.tokens, self.pages.block_size)

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """A mask has a column for each token."""
        return self.tokens + query_length, 0

    def get_max_length(self) -> int:
        """The window, or -1."""
        return -1 if self.sliding_window is None else self.sliding_window

    def activate_past_recording(self) -> None:
        """Nothing: some tokens more than the window are kept anyway."""
        self.record_past = True

    def reset(self) -> None:
        """Forget all tokens."""
        self._keep(0)
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens; a positive number is the length to keep.

        Raises:
            RuntimeError: the window before the next token has been overwritten in part.
        """
        if not tokens_to_remove or not self.is_initialized:
            return
        keep = tokens_to_remove if tokens_to_remove > 0 else self.tokens + tokens_to_remove
        keep = min(max(keep, 0), self.tokens)
        self._written = max(self._written, self.tokens)
        if self.first(keep) < min(self._written - self.pages.block_size, keep):
            raise RuntimeError(
                f"A sliding window of {self.sliding_window} tokens cannot be cropped by"
                f" {self.tokens - keep}: of the tokens before it no more than {BEYOND_WINDOW} are kept."
                " Call reset() and begin with the first token."
            )
        self._keep(keep)

    def _keep(self, tokens: int) -> None:
        self.tokens = tokens
        if tokens == 0:
            self._written = 0
        if self.storage is not None:
            self.used.fill_(tokens)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch for beam search, in place."""
        if not self.is_initialized:
            return
        storage = self.storage
        assert storage is not None
        index = beam_idx.to(storage.device)
        for tensor in self.pages:
            if tensor is not None:
                held = tensor[:, :, : self._held]
                held.copy_(held.index_select(0, index))
        if self.index == 0:
            storage.shift.copy_(storage.shift.index_select(0, index))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch entry."""
        self._rebatch(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some batch entries."""
        self._rebatch(lambda tensor: tensor[indices])

    def _rebatch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Another batch has another storage, this layer's alone until a forward pass brings them together."""
        if not self.is_initialized:
            return
        old, pages = self.storage, self.pages
        assert old is not None
        shift = change(old.shift)
        windows = (self.sliding_window,)
        new = Storage((self.quantizer,), windows, shift.shape[0], old.capacity, old.device)
        for into, tensor in zip(new.pages[0], pages, strict=True):
            if into is not None and tensor is not None:
                into[:, :, : self._held] = change(tensor[:, :, : self._held])
        new.shift.copy_(shift)
        self.storage, self.index = new, 0
        self.used.fill_(self.tokens)

    def offload(self) -> None:
        """Nothing: codes stay where they are."""

    def prefetch(self) -> None:
        """Nothing: codes stay where they are."""

    def __deepcopy__(self, memo: dict[int, Any]) -> CodesLayer:
        new = copy.copy(self)
        new.storage = copy.deepcopy(self.storage, memo)
        memo[id(self)] = new
        return new


class CachedTokens:
    """Stands for all keys (and values) of a layer where its attention function expects them.

    Args:
        layer: of the cache.
        new: how many of its tokens are those of this forward pass.
        fresh: keys and values of all that these see, where the layer does not hold them all.
    """

    def __init__(self, layer: CodesLayer, new: int, fresh: tuple[Tensor, Tensor] | None = None) -> None:
        self.layer = layer
        self.new = new
        self.fresh = fresh

    @property
    def added(self) -> int:
        """What :attr:`CodesLayer.used` is behind, these tokens included."""
        storage = self.layer.storage
        assert storage is not None
        return self.new if storage.together else 0

    def decodes(self, mask: Tensor | None) -> bool:
        """Whether attention of so many queries with such a mask is computed from codes."""
        return self.new <= QUERIES and (mask is None or (mask.dtype == torch.bool and mask.shape[1] == 1))

    @property
    def first(self) -> int:
        """The first token that the new ones see."""
        return self.layer.first(self.layer.tokens - self.new)
