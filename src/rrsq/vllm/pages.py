"""How keys and values lie in vLLM's pages, and what vLLM is told of it.

A page holds one block of tokens of one layer. For each key head there stand, one behind the other, the key
codes of all its tokens, the value codes, the key scales, the key minima (if there are any), the value scales
and the value minima: the tensors of :class:`~rrsq.kernels.CachePages`, as views.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from ..kernels import CachePages
from ..kernels.cache import page_shapes
from ..runtime.kv_cache.quantizer import CacheTensorQuantizer, KVQuantizer

__all__ = ["PageLayout", "QuantizedFullSpec", "QuantizedSlidingSpec"]


class _Part(NamedTuple):
    """Bytes that one token of one head takes in each section; ``minimum`` is 0 without minima."""

    codes: int
    scale: int
    minimum: int

    @classmethod
    def of(cls, quantizer: CacheTensorQuantizer) -> _Part:
        scheme = quantizer.scheme
        codes, groups = page_shapes(quantizer.head_dim, scheme.bits, quantizer.group_size)
        return cls(codes, 2 * groups, 2 * groups if scheme.zero_point else 0)


class PageLayout(NamedTuple):
    """The sections of a page; layers of the same sizes have equal ones."""

    keys: _Part
    values: _Part

    @classmethod
    def of(cls, quantizer: KVQuantizer) -> PageLayout:
        """That of a layer's quantizer."""
        return cls(_Part.of(quantizer.keys), _Part.of(quantizer.values))

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of one head, keys and values."""
        return sum(self.keys) + sum(self.values)

    @property
    def name(self) -> str:
        """One that tells layouts apart."""
        return "_".join(str(size) for part in self for size in part)

    def views(self, pages: Tensor) -> CachePages:
        """The sections of uint8 pages ``[blocks, kv_heads, block_size, token_bytes]``, nothing copied.

        Only the last two dimensions need be contiguous.
        """
        block_size = pages.shape[2]
        heads = pages.flatten(2)
        begin = 0

        def section(size: int) -> Tensor:
            nonlocal begin
            part = heads[..., begin : begin + block_size * size]
            begin += block_size * size
            return part

        def codes(size: int) -> Tensor:
            return section(size).unflatten(-1, (block_size, size))

        def numbers(size: int) -> Tensor | None:
            if size == 0:
                return None
            return section(size).view(torch.float16).unflatten(-1, (block_size, size // 2))

        key_codes, value_codes = codes(self.keys.codes), codes(self.values.codes)
        key_scale, key_minimum = numbers(self.keys.scale), numbers(self.keys.minimum)
        value_scale, value_minimum = numbers(self.values.scale), numbers(self.values.minimum)
        assert key_scale is not None
        assert value_scale is not None
        return CachePages(key_codes, key_scale, key_minimum, value_codes, value_scale, value_minimum)


@dataclass(frozen=True, kw_only=True)
class QuantizedFullSpec(FullAttentionSpec):
    """Pages of a layer that sees all tokens; ``token_bytes`` are those of one head."""

    token_bytes: int = 0

    @property
    def real_page_size_bytes(self) -> int:
        """Bytes of a page without padding."""
        return self.block_size * self.num_kv_heads * self.token_bytes

    @classmethod
    def merge(cls, specs: list[QuantizedFullSpec]) -> QuantizedFullSpec:
        """One for several layers; AssertionError, as vLLM expects it, where their pages differ."""
        sizes = {getattr(spec, "token_bytes", None) for spec in specs}
        assert len(sizes) == 1, "pages of different sizes cannot be merged"
        return replace(super().merge(specs), token_bytes=specs[0].token_bytes)


@dataclass(frozen=True, kw_only=True)
class QuantizedSlidingSpec(SlidingWindowSpec):
    """The same for a layer with a sliding window."""

    token_bytes: int = 0

    @property
    def real_page_size_bytes(self) -> int:
        """Bytes of a page without padding."""
        return self.block_size * self.num_kv_heads * self.token_bytes
