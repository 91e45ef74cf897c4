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

__all__ = ["CachedTokens", "CodesLayer", "Storage", "enough"]


def enough(tokens: int) -> int:
    """A capacity for so many tokens with room for more, in steps that are few over a long text."""
    capacity = 512
    while capacity < tokens:
        capacity *= 2
    return capacity if capacity <= 4096 or tokens > capacity * 3 // 4 else capacity * 3 // 4


class Storage:
    """What the layers of one cache store, at addresses that a CUDA graph can hold on to.

    Attributes:
        pages: of each layer, one block a sequence.
        used: int32 ``[layers]``, tokens stored before a forward pass.
        used_of: of each layer, ``[1]`` of ``used``; making one at a call would cost as much as a launch.
        shift: int32 ``[batch]``, position of the first row of each sequence.
        together: ``used`` is raised for all layers at the end of a forward pass, not by each layer.
        graphs: of a :class:`~rrsq.runtime.decoding.Decoder` and its prompts.
        structure: of the model that they were captured of, None where nothing can be.
        prompts: a forward pass is running that may be captured if it is of prompts.
    """

    def __init__(
        self, quantizers: tuple[KVQuantizer, ...], batch: int, capacity: int, device: torch.device
    ) -> None:
        self.batch, self.capacity, self.device = batch, capacity, device
        with torch.inference_mode(False):
            self.pages = [quantizer.pages(batch, capacity, device) for quantizer in quantizers]
            self.used = torch.zeros(len(quantizers), dtype=torch.int32, device=device)
            self.shift = torch.zeros(batch, dtype=torch.int32, device=device)
            self.used_of = _one_by_one(self.used)
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
    for keys (:mod:`.attention`). Sliding layers keep all tokens; attention does not look at those outside of
    the window.

    Args:
        quantizer: of the attention.
        sliding_window: tokens a query sees, itself included; None: all.
        storage: shared with the cache's other layers, or None: one of its own, when tokens come.
        index: of the layer in the storage.
        reserved: tokens that there is to be room for from the start.

    Attributes:
        tokens: stored.
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
        self.tokens = 0
        self.storage = storage
        self.index = index

    @property
    def keys(self) -> Tensor | None:
        """All keys, dequantized, ``[batch, kv_heads, tokens, head_dim]``."""
        return self._read()[0] if self.is_initialized else None

    @keys.setter
    def keys(self, _: object) -> None:
        """What is stored is codes: what transformers sets is its own empty beginning."""

    @property
    def values(self) -> Tensor | None:
        """All values, dequantized, ``[batch, kv_heads, tokens, head_dim]``."""
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
    def used(self) -> Tensor:
        """int32 ``[1]``: tokens stored, of which a running forward pass may be one ahead."""
        assert self.storage is not None
        return self.storage.used_of[self.index]

    @property
    def shift(self) -> Tensor:
        """int32 ``[batch]``: position of the first row of each sequence."""
        assert self.storage is not None
        return self.storage.shift

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens stored, without the room for more."""
        if self.storage is None:
            return 0
        rows = sum(x.numel() * x.element_size() for x in self.pages if x is not None)
        return rows * self.tokens // self.storage.capacity

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Append tokens ``[batch, kv_heads, new, head_dim]``; both results are :class:`CachedTokens`."""
        batch, _, new, _ = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        if self.storage is None or not self.storage.fits(batch, self.tokens + new, key_states.device):
            capacity = enough(max(self.tokens + new, self.reserved))
            self.attach(Storage((self.quantizer,), batch, capacity, key_states.device), 0)
            self.used.fill_(self.tokens)
        storage = self.storage
        assert storage is not None
        if self.tokens == 0 and self.index == 0:
            if self.next_positions is None:
                storage.shift.zero_()
            else:
                storage.shift.copy_(self.next_positions[:, -1].expand(batch) - (new - 1))
        used = storage.used_of[self.index]
        self.quantizer.append(storage.pages[self.index], key_states, value_states, used, storage.shift)
        self.tokens += new
        self.is_initialized = True
        if not storage.together:
            used.add_(new)
        tokens = CachedTokens(self, new)
        return tokens, tokens

    def attach(self, storage: Storage, index: int) -> None:
        """Keep the tokens in another storage from now on, whose ``used`` the caller sets."""
        old = self.storage
        if old is not None and self.tokens:
            for new, tensor in zip(storage.pages[index], self.pages, strict=True):
                if new is not None and tensor is not None:
                    new[:, :, : self.tokens] = tensor[:, :, : self.tokens]
            storage.shift.copy_(old.shift)
        self.storage, self.index = storage, index

    def filled(self, tokens: int, dtype: torch.dtype) -> None:
        """Know of tokens that a graph has written, whose keys were in ``dtype``."""
        assert self.storage is not None
        self.tokens, self.dtype, self.device = tokens, dtype, self.storage.device
        self.is_initialized = True

    def _read(self) -> tuple[Tensor, Tensor]:
        assert self.storage is not None
        like = torch.empty(
            (self.storage.batch, self.quantizer.keys.head_dim), dtype=self.dtype, device=self.storage.device
        )
        return self.quantizer.read(self.pages, like, 0, self.tokens, self.storage.shift)

    def get_seq_length(self) -> int:
        """Tokens stored."""
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """A mask has a column for each token."""
        return self.tokens + query_length, 0

    def get_max_length(self) -> int:
        """The window, or -1."""
        return -1 if self.sliding_window is None else self.sliding_window

    def activate_past_recording(self) -> None:
        """Nothing is forgotten anyway."""
        self.record_past = True

    def reset(self) -> None:
        """Forget all tokens."""
        self._keep(0)
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens; a positive number is the length to keep."""
        if tokens_to_remove and self.is_initialized:
            keep = tokens_to_remove if tokens_to_remove > 0 else self.tokens + tokens_to_remove
            self._keep(min(max(keep, 0), self.tokens))

    def _keep(self, tokens: int) -> None:
        self.tokens = tokens
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
                tensor[:, :, : self.tokens] = tensor[:, :, : self.tokens].index_select(0, index)
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
        new = Storage((self.quantizer,), shift.shape[0], old.capacity, old.device)
        for into, tensor in zip(new.pages[0], pages, strict=True):
            if into is not None and tensor is not None:
                into[:, :, : self.tokens] = change(tensor[:, :, : self.tokens])
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
    """

    def __init__(self, layer: CodesLayer, new: int) -> None:
        self.layer = layer
        self.new = new

    @property
    def added(self) -> int:
        """What :attr:`CodesLayer.used` is behind, these tokens included."""
        storage = self.layer.storage
        assert storage is not None
        return self.new if storage.together else 0

    def decodes(self, mask: Tensor | None) -> bool:
        """Whether attention of so many queries with such a mask is computed from codes."""
        return self.new <= QUERIES and (mask is None or (mask.dtype == torch.bool and mask.shape[1] == 1))
