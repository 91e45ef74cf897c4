"""vLLM's attention over keys and values in 4 (or 8) bits.

New keys and values are stored first, and then all are read as they are stored: no query sees a key that was
not quantized, as in transformers (:mod:`rrsq.runtime.kv_cache`). Requests of one or a few new tokens decode
from the codes. Those of many, prompts and parts of prompts, read the keys and values that they see out once,
in 16 bits, for FlashAttention.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec

from ..errors import UsageError
from ..kernels import CachePages
from ..kernels.cache_attend import QUERIES
from ..runtime.kv_cache.quantizer import KVQuantizer
from .pages import PageLayout, QuantizedSlidingSpec

__all__ = ["CacheMetadata", "CacheMetadataBuilder", "Prompts", "QuantizedAttention", "QuantizedCacheBackend"]

Ranges = list[tuple[int, int]]


@dataclass
class Prompts:
    """Requests of many new tokens, whose keys are read out together.

    Attributes:
        first, last: their tokens in the batch.
        queries, keys: of each request, its new tokens and the keys that are read out for it.
        first_key: of each request, the position of the first of them.
        query_starts, key_starts: int32 ``[requests + 1]`` on the device, where each request begins.
        slots: int64, places of the keys in the cache, one request after the other.
        positions: int64, of the keys.
        ranges: of each request, the first and the last position of tokens that see each other whatever their
            order, those of images; None: there are none.
    """

    first: int
    last: int
    queries: list[int]
    keys: list[int]
    first_key: list[int]
    query_starts: Tensor
    key_starts: Tensor
    slots: Tensor
    positions: Tensor
    ranges: list[Ranges] | None


@dataclass
class CacheMetadata(AttentionMetadata):
    """What the layers of a group need to know of a batch, in which decoding requests come first.

    Attributes:
        slots: int64 ``[tokens]``, places of the new tokens in the cache; negative ones stand for padding.
        positions: int64 ``[tokens]``.
        decodes: requests that decode from codes.
        queries: new tokens of each of them.
        lengths: int32 ``[decodes]``, cached tokens, the new ones included.
        block_table: int32 ``[decodes, blocks]``.
        prompts: the other requests.
    """

    slots: Tensor
    positions: Tensor
    decodes: int
    queries: int
    lengths: Tensor
    block_table: Tensor
    prompts: list[Prompts]


class CacheMetadataBuilder(AttentionMetadataBuilder[CacheMetadata]):
    """Makes a :class:`CacheMetadata` of what vLLM says of a batch, without waiting for the GPU."""

    # Numbers of requests are in shapes, those of tokens in tensors: one graph serves all lengths.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self.reorder_batch_threshold: int = min(self.reorder_batch_threshold or 1, QUERIES)
        self._most_keys = most_keys(vllm_config)
        # Where a layer without a window shares the group, all keys are read out.
        sliding = isinstance(kv_cache_spec, QuantizedSlidingSpec)
        self._window = kv_cache_spec.sliding_window if sliding else 0

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: AttentionSpec
    ) -> AttentionCGSupport:
        """Batches of equal numbers of new tokens, as far as those decode from codes."""
        if vllm_config.num_speculative_tokens >= QUERIES:
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return cls._cudagraph_support

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> CacheMetadata:
        """For a graph: with short texts, since its kernels are run too."""
        metadata = self.build(0, common_attn_metadata)
        metadata.lengths.fill_(1)
        return metadata

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CacheMetadata:
        """Of one batch."""
        batch = common_attn_metadata
        assert batch.causal is True, "rrsq's cache attends to earlier tokens only"
        assert batch.positions is not None
        decodes, _, decode_tokens, _ = split_decodes_and_prefills(
            batch, decode_threshold=self.reorder_batch_threshold, require_uniform=True
        )
        return CacheMetadata(
            slots=batch.slot_mapping[: batch.num_actual_tokens],
            positions=batch.positions[: batch.num_actual_tokens],
            decodes=decodes,
            queries=decode_tokens // max(decodes, 1),
            lengths=batch.seq_lens[:decodes],
            block_table=batch.block_table_tensor[:decodes],
            prompts=list(self._prompts(batch, decodes)) if decodes < batch.num_reqs else [],
        )

    def _prompts(self, batch: CommonAttentionMetadata, first: int) -> Iterator[Prompts]:
        """The requests from ``first`` on, in parts of which each reads out a bounded number of keys."""
        starts = batch.query_start_loc_cpu[first : batch.num_reqs + 1].numpy()
        upper = batch.seq_lens_cpu_upper_bound
        lengths = (batch.seq_lens.cpu() if upper is None else upper)[first : batch.num_reqs].numpy()
        queries = np.diff(starts)
        first_key = np.zeros_like(lengths)
        if self._window:
            first_key = np.maximum(lengths - queries - self._window + 1, 0)
        keys = lengths - first_key
        begin, total = 0, 0
        for end in range(len(queries) + 1):
            if end == len(queries) or total + keys[end] > self._most_keys:
                if end > begin and starts[end] > starts[begin]:
                    rows = slice(begin, end)
                    yield self._part(
                        batch, first + begin, starts[begin : end + 1], keys[rows], first_key[rows]
                    )
                begin, total = end, 0
            if end < len(queries):
                total += keys[end]

    def _part(
        self,
        batch: CommonAttentionMetadata,
        row: int,
        starts: np.ndarray[Any, Any],
        keys: np.ndarray[Any, Any],
        first_key: np.ndarray[Any, Any],
    ) -> Prompts:
        """The requests from ``row`` on, as many as there are ``keys``."""
        requests = len(keys)
        queries = np.diff(starts)
        table = np.zeros((4, requests + 1), np.int32)
        table[0] = starts - starts[0]
        table[1, 1:] = np.cumsum(keys)
        table[2, :-1], table[3, :-1] = keys, first_key
        query_starts, key_starts, count, begin = async_tensor_h2d(table, self.device)
        total = int(table[1, -1])
        which = torch.repeat_interleave(count[:-1], output_size=total)
        positions = torch.arange(total, device=self.device) + (begin - key_starts)[which]
        block_size = self.kv_cache_spec.block_size
        block = batch.block_table_tensor[row + which, positions // block_size]
        ranges: dict[int, Ranges] = batch.mm_req_doc_ranges or {}
        own = [list(ranges.get(row + index) or ()) for index in range(requests)]
        return Prompts(
            first=int(starts[0]),
            last=int(starts[-1]),
            queries=queries.tolist(),
            keys=keys.tolist(),
            first_key=first_key.tolist(),
            query_starts=query_starts,
            key_starts=key_starts,
            slots=block.long() * block_size + positions % block_size,
            positions=positions,
            ranges=own if any(own) else None,
        )


class QuantizedCacheBackend(AttentionBackend):
    """What vLLM asks about the attention; :meth:`for_layout` gives the class of a layer's pages."""

    layout: ClassVar[PageLayout | None] = None
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto"]
    forward_includes_kv_cache_update: bool = True

    @classmethod
    @functools.cache
    def for_layout(cls, layout: PageLayout) -> type[QuantizedCacheBackend]:
        """The same class for the same pages: vLLM tells groups of layers apart by its name."""
        return type(f"{cls.__name__}_{layout.name}", (cls,), {"layout": layout, "__module__": cls.__module__})

    @staticmethod
    def get_name() -> str:
        """The name under which vLLM knows backends that are not its own."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[QuantizedAttention]:
        """What computes."""
        return QuantizedAttention

    @staticmethod
    def get_builder_cls() -> type[CacheMetadataBuilder]:
        """What describes a batch."""
        return CacheMetadataBuilder

    @classmethod
    def get_kv_cache_shape(
        cls,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """Of the uint8 pages of a layer."""
        assert cls.layout is not None
        return (num_blocks, num_kv_heads, block_size, cls.layout.token_bytes)

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """The pages come first, so that vLLM may pad them."""
        return (1, 0, 2, 3, 4) if include_num_layers_dimension else (0, 1, 2, 3)

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[int | MultipleOf]:
        """Sections begin at multiples of 16 bytes then."""
        return [MultipleOf(16)]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """That of the kernels."""
        return head_size % 2 == 0 and head_size <= 256

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Yes."""
        return True

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        """Tokens of an image see each other."""
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Pages have not been moved between machines yet."""
        return False


class QuantizedAttention(AttentionImpl[CacheMetadata]):
    """The attention of one layer.

    Attributes:
        quantizer: of its keys and values; given by :class:`~.cache.CacheMethod`.

    Raises:
        UsageError: the model asks for a kind of attention that is not implemented.
    """

    supports_dcp: bool = False
    quantizer: KVQuantizer

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        asked = {"alibi_slopes": alibi_slopes, "kv_sharing": kv_sharing_target_layer_name, **others}
        unknown = [name for name, value in asked.items() if value is not None]
        if attn_type != AttentionType.DECODER or unknown:
            what = ", ".join(unknown) or f"attention of the kind '{attn_type}'"
            raise UsageError(
                f"The 4-bit KV cache does not support {what}. Serve the model with --kv-cache-dtype bfloat16."
            )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.sliding_window = sliding_window or 0
        self.logits_soft_cap = float(logits_soft_cap or 0.0)
        self._pages: tuple[Tensor, CachePages] | None = None
        self._flash_version = _flash_version(head_size)
        from vllm.config import get_current_vllm_config

        self._most_keys = most_keys(get_current_vllm_config())

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CacheMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Store the new keys and values, and attend.

        Args:
            layer: the module.
            query: ``[tokens, heads, head_dim]`` after RoPE, in the order of the batch, with padding behind.
            key, value: ``[tokens, kv_heads, head_dim]``.
            kv_cache: uint8 pages ``[blocks, kv_heads, block_size, token_bytes]``.
            attn_metadata: of the batch; None while vLLM measures how much memory a model needs.
            output: ``[tokens, heads, head_dim]``, written to.
            output_scale, output_block_scale: not supported.
        """
        assert output_scale is None
        assert output_block_scale is None
        if attn_metadata is None:
            self.quantizer.constants(key.device)  # Not while a graph is captured.
            # What a prompt reads out is memory that the cache must leave.
            torch.empty(2, self._most_keys, *key.shape[1:], dtype=key.dtype, device=key.device)
            return output.zero_()
        batch, pages, quantizer = attn_metadata, self._sections(kv_cache), self.quantizer
        tokens = batch.slots.shape[0]
        quantizer.append(
            pages,
            key[:tokens].transpose(0, 1).unsqueeze(0),
            value[:tokens].transpose(0, 1).unsqueeze(0),
            batch.slots,
            batch.positions,
        )
        if batch.decodes:
            rows = batch.decodes * batch.queries
            shape = (batch.decodes, batch.queries, self.num_heads, self.head_size)
            quantizer.attend(
                pages,
                query[:rows].view(shape),
                batch.lengths,
                0,
                None,
                None,
                self.scale,
                self.logits_soft_cap,
                self.sliding_window,
                batch.block_table,
                output[:rows].view(shape),
            )
        for prompts in batch.prompts:
            keys, values = quantizer.gather(pages, query, prompts.slots, prompts.positions)
            flash = prompts.ranges is None and self._can_flash(query)
            attend = self._flash if flash else self._plain
            own = slice(prompts.first, prompts.last)
            attend(query[own], keys, values, prompts, output[own])
        return output

    def _sections(self, kv_cache: Tensor) -> CachePages:
        """The sections of the pages, made once: vLLM hands over the same tensor in every call."""
        if self._pages is None or self._pages[0] is not kv_cache:
            self._pages = kv_cache, PageLayout.of(self.quantizer).views(kv_cache)
        return self._pages[1]

    def _can_flash(self, query: Tensor) -> bool:
        known = query.dtype in (torch.float16, torch.bfloat16) and self.head_size % 8 == 0
        return known and query.is_cuda and self._flash_version is not None

    def _flash(self, query: Tensor, keys: Tensor, values: Tensor, prompts: Prompts, output: Tensor) -> None:
        _flash_function()(
            q=query,
            k=keys,
            v=values,
            out=output,
            cu_seqlens_q=prompts.query_starts,
            cu_seqlens_k=prompts.key_starts,
            max_seqlen_q=max(prompts.queries),
            max_seqlen_k=max(prompts.keys),
            softmax_scale=self.scale,
            causal=True,
            window_size=[self.sliding_window - 1, 0] if self.sliding_window else [-1, -1],
            softcap=self.logits_soft_cap,
            fa_version=self._flash_version,
        )

    def _plain(self, query: Tensor, keys: Tensor, values: Tensor, prompts: Prompts, output: Tensor) -> None:
        """Where FlashAttention does not run: in float32, without a GPU, with images."""
        sizes = prompts.queries, prompts.keys
        parts = zip(query.split(sizes[0]), keys.split(sizes[1]), values.split(sizes[1]), strict=True)
        for index, (part, into) in enumerate(zip(parts, output.split(sizes[0]), strict=True)):
            ranges = [] if prompts.ranges is None else prompts.ranges[index]
            into.copy_(self._attend(*part, prompts.first_key[index], ranges))

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, first: int, ranges: Ranges) -> Tensor:
        """Of one request: queries ``[new, heads, head_dim]``, those of the last keys; ``first``: position."""
        new, seen = query.shape[0], keys.shape[0]
        key = torch.arange(first, first + seen, device=query.device)
        last = key[seen - new :].unsqueeze(1)
        mask = key <= last
        if self.sliding_window:
            mask &= key > last - self.sliding_window
        for begin, end in ranges:
            mask |= (key >= begin) & (key <= end) & (last >= begin) & (last <= end)
        q, k, v = (x.transpose(0, 1) for x in (query, keys, values))
        if not self.logits_soft_cap:
            out = nn.functional.scaled_dot_product_attention(
                q[None], k[None], v[None], mask, scale=self.scale, enable_gqa=True
            )
            return out[0].transpose(0, 1)
        shared = self.num_heads // self.num_kv_heads
        logits = q.float() @ k.float().repeat_interleave(shared, 0).transpose(1, 2) * self.scale
        logits = self.logits_soft_cap * torch.tanh(logits / self.logits_soft_cap)
        weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)
        return (weights @ v.float().repeat_interleave(shared, 0)).transpose(0, 1).to(query.dtype)


def most_keys(vllm_config: VllmConfig) -> int:
    """Keys that prompts read out at once at most: those of the longest text, or of a whole batch."""
    return max(
        int(vllm_config.model_config.max_model_len), int(vllm_config.scheduler_config.max_num_batched_tokens)
    )


@functools.cache  # An import at each call costs the host a microsecond.
def _flash_function() -> Any:
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    return flash_attn_varlen_func


def _flash_version(head_size: int) -> int | None:
    """The FlashAttention that vLLM has for this GPU, or None."""
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    try:
        return get_flash_attn_version(head_size=head_size)
    except (AssertionError, ImportError):
        return None
