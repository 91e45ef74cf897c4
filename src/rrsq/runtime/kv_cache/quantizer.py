"""The KV cache in 4 bits, as a transformers cache layer that an attention hook puts in place.

A :class:`KVQuantizer` is a submodule of each attention of a KV4 checkpoint. Before the attention runs, its
hook turns the layer's empty dynamic cache into a :class:`QuantizedCacheLayer`, so that ``generate()`` and any
other caller uses it without being told, and so that a forward pass without a cache sees the same quantized
keys and values.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from ... import kernels
from ...kernels import CachePages, forced_backend
from ...kernels.cache import decode_cache, encode_cache, page_shapes
from ...kernels.operation import Operation
from ..modules.gradient import needs_gradient
from ..modules.linear import Projections
from ..rotation.hadamard import orthonormal, plan_hadamard
from .attention import ATTENTION
from .layers import NoCache, QuantizedCacheLayer, QuantizedSlidingLayer
from .rope import KeyRotary
from .static import CodesLayer

__all__ = ["CacheScheme", "KVQuantizer"]


@dataclass(frozen=True)
class CacheScheme:
    """How keys or values are stored; see :class:`rrsq.recipe.CacheTensor`."""

    bits: int
    group_size: int
    zero_point: bool
    rotate: bool
    offset: bool
    signed: bool = False
    sink: bool = False
    balance: bool = False


@functools.lru_cache(maxsize=16)
def _head_rotation(head_dim: int, device: torch.device) -> Tensor:
    """The Hadamard matrix over ``head_dim``, orthonormal, float32.

    Small enough to be multiplied by as it is, by the same product whichever kernels run the linears: a code
    that fell to the other side of a rounding boundary would change all later tokens.
    """
    with torch.inference_mode(False):
        return orthonormal(plan_hadamard(head_dim), torch.float32).to(device)


class CacheTensorQuantizer(nn.Module):
    """Encodes and decodes keys or values of one layer, ``[batch, kv_heads, tokens, head_dim]``."""

    offset: Tensor | None
    sink: Tensor | None
    balance: Tensor | None

    def __init__(self, scheme: CacheScheme, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.scheme = scheme
        self.group_size = math.gcd(scheme.group_size, head_dim)
        self.head_dim = head_dim
        self.kv_heads = kv_heads
        self._rotation: Tensor | None = None
        for name, there, neutral in (
            ("offset", scheme.offset, 0.0),
            ("sink", scheme.sink, 0.0),
            ("balance", scheme.balance, 1.0),
        ):
            buffer = torch.full((kv_heads, head_dim), neutral, dtype=torch.float32) if there else None
            self.register_buffer(name, buffer)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # These stay float32 whatever dtype the model is cast to.
        before = dict(self._buffers)
        module = super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            old = before[name]
            if old is not None and buffer is not None and buffer.dtype != torch.float32:
                self._buffers[name] = old.to(buffer.device)
        return module

    def page(self, batch: int, capacity: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """Zero codes, scales and minima (or None), ``[batch, kv_heads, capacity, ...]``."""
        codes, groups = page_shapes(self.head_dim, self.scheme.bits, self.group_size)
        rows = (batch, self.kv_heads, capacity)
        scale = torch.zeros(*rows, groups, dtype=torch.float16, device=device)
        minimum = torch.zeros_like(scale) if self.scheme.zero_point else None
        return torch.zeros(*rows, codes, dtype=torch.uint8, device=device), scale, minimum

    def rotation(self, device: torch.device) -> Tensor:
        """The Hadamard matrix, float32 ``[head_dim, head_dim]``, orthonormal.

        It is kept here, where a forward pass that is traced finds it: Dynamo passes over caches of functions
        and would trace how it is made.
        """
        made = self._rotation
        if made is None or made.device != device:
            made = self._rotation = _head_rotation(self.head_dim, device)
        return made

    def signs(self, device: torch.device) -> Tensor | None:
        """int8 ``[head_dim, head_dim]`` of ±1: the Hadamard matrix before it is made orthonormal, or None."""
        if not self.scheme.rotate:
            return None
        return (self.rotation(device) * self.head_dim**0.5).round().to(torch.int8)

    def forward(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The offset, that of position 0 where it has one of its own, and the balance, where the model runs.

        A call brings them there from where accelerate has offloaded them.
        """
        return self.offset, self.sink, self.balance

    def set_bits(self, bits: int) -> None:
        """Store ``bits`` a code from now on."""
        self.scheme = replace(self.scheme, bits=bits)

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Codes, scales and minima of ``x``, from which its offset has been taken."""
        x = x.float()
        if self.scheme.rotate:
            x = x @ self.rotation(x.device)
        scheme = self.scheme
        codes, scale, minimum = encode_cache(
            x, scheme.bits, self.group_size, scheme.zero_point, scheme.signed
        )
        stored = {"codes": codes, "scale": scale}
        return stored if minimum is None else {**stored, "minimum": minimum}

    def decode(self, stored: dict[str, Tensor]) -> Tensor:
        """float32 ``[batch, kv_heads, tokens, head_dim]``, without the offset."""
        x = decode_cache(stored["codes"], stored["scale"], stored.get("minimum"), self.scheme.bits)
        return x @ self.rotation(x.device).t() if self.scheme.rotate else x


class _Constants(NamedTuple):
    """What the kernels need beside the tokens; see :func:`rrsq.kernels.cache_append`."""

    key_signs: Tensor | None
    value_signs: Tensor | None
    key_offset: Tensor | None
    key_sink: Tensor | None
    key_balance: Tensor | None
    value_offset: Tensor | None
    frequencies: Tensor | None
    rope_scale: float


class KVQuantizer(nn.Module):
    """Quantizes the keys and values of one attention.

    Where there are kernels for it, the cache is a :class:`~.static.CodesLayer`, which attention reads as
    codes; elsewhere it is a :class:`~.layers.QuantizedCacheLayer`, which gives keys and values back.

    Args:
        keys, values: schemes; None keeps that tensor in 16 bits.
        kv_heads, head_dim: sizes.
        rotary: the layer's RoPE, by which a key offset that was taken off before it is put back; None where
            keys are not rotated.
    """

    def __init__(
        self,
        keys: CacheScheme,
        values: CacheScheme,
        kv_heads: int,
        head_dim: int,
        rotary: KeyRotary | None,
    ) -> None:
        super().__init__()
        self.keys = CacheTensorQuantizer(keys, kv_heads, head_dim)
        self.values = CacheTensorQuantizer(values, kv_heads, head_dim)
        self.rotary = rotary
        self._signed = keys.signed, values.signed
        self._constants: dict[torch.device, _Constants] = {}
        self._chosen: dict[Any, Callable[..., Any]] = {}
        self._config: Any = None

    def pages(self, batch: int, capacity: int, device: torch.device) -> CachePages:
        """Empty storage for ``capacity`` tokens of each sequence, one block a sequence."""
        return CachePages(
            *self.keys.page(batch, capacity, device), *self.values.page(batch, capacity, device)
        )

    def append(
        self, pages: CachePages, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor | None
    ) -> None:
        """Store new tokens; see :func:`rrsq.kernels.cache_append`."""
        append = self._choose(kernels.cache_append, "keys", keys)
        append(keys, values, *pages, slots, positions, *self.constants(keys.device), *self._signed)

    def attend(
        self,
        pages: CachePages,
        query: Tensor,
        lengths: Tensor,
        added: int,
        mask: Tensor | None,
        shift: Tensor | None,
        scaling: float,
        softcap: float,
        window: int,
        block_table: Tensor | None = None,
        output: Tensor | None = None,
    ) -> Tensor:
        """Attention from codes, into ``output`` if it is given; see :func:`rrsq.kernels.cache_attend`."""
        constants = self.constants(query.device)
        attend = self._choose(kernels.cache_attend, "query", query, query.shape[1])
        if output is None:
            output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        attend(
            query,
            *pages,
            lengths,
            added,
            block_table,
            mask,
            constants.key_signs,
            constants.key_offset,
            constants.key_sink,
            constants.key_balance,
            None if constants.value_signs is not None else constants.value_offset,
            constants.frequencies,
            constants.rope_scale,
            shift,
            scaling,
            softcap,
            window,
            output,
        )
        if constants.value_signs is None:
            return output
        out = output.float() @ self.values.rotation(output.device).t()
        if constants.value_offset is not None:
            shared = query.shape[2] // constants.value_offset.shape[0]
            out = out + constants.value_offset.repeat_interleave(shared, 0)
        return output.copy_(out)

    def read(
        self,
        pages: CachePages,
        like: Tensor,
        begin: int,
        end: int,
        shift: Tensor | None,
        block_table: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens; see :func:`rrsq.kernels.cache_read`."""
        read = self._choose(kernels.cache_read, "like", like)
        return read(like, *pages, begin, end, block_table, shift, *self.constants(like.device))

    def gather(
        self, pages: CachePages, like: Tensor, slots: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of listed tokens; see :func:`rrsq.kernels.cache_gather`."""
        gather = self._choose(kernels.cache_gather, "like", like)
        return gather(like, *pages, slots, positions, *self.constants(like.device))

    def shard(self, kv_heads: int, most_tokens: int) -> KVQuantizer:
        """One of the same schemes for ``kv_heads`` heads, with offsets of zero.

        ``most_tokens``: that a text can reach; it decides which angles all texts get where there are two.
        """
        rotary = None if self.rotary is None else self.rotary.for_all(most_tokens)
        return KVQuantizer(self.keys.scheme, self.values.scheme, kv_heads, self.keys.head_dim, rotary)

    def round_trip(self, keys: Tensor, values: Tensor, position_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """What a cache that is empty before would give back of all its tokens."""
        batch, _, tokens, _ = keys.shape
        shift = None
        if position_ids is not None:
            shift = (position_ids[:, -1].expand(batch) - (tokens - 1)).to(torch.int32)
        return self.stored_and_read(keys, values, shift)

    def stored_and_read(self, keys: Tensor, values: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same; ``shift``: int32 ``[batch]``, position of the first token of each sequence, or None."""
        batch, _, tokens, _ = keys.shape
        pages = self.pages(batch, tokens, keys.device)
        slots, constants = torch.zeros(1, dtype=torch.int32, device=keys.device), self.constants(keys.device)
        append = self._choose(kernels.cache_append, "keys", keys)
        append(keys, values, *pages, slots, shift, *constants, *self._signed)
        read = self._choose(kernels.cache_read, "like", keys)
        return read(keys, *pages, 0, tokens, None, shift, *constants)

    def _choose(
        self, operation: Operation[..., Any], name: str, x: Tensor, tokens: int | None = None
    ) -> Callable[..., Any]:
        """The implementation for tensors like ``x``, the argument ``name``; chosen once.

        ``tokens``: how many are new to a sequence, where the choice depends on it.
        """
        if is_compiling() or type(x) is not Tensor:  # What is traced chooses when it runs.
            return operation
        key = operation.name, x.device, x.dtype, tokens, forced_backend()
        found = self._chosen.get(key)
        if found is None:
            facts: dict[str, Any] = {name: x.dtype, "head_dim": self.keys.head_dim}
            if tokens is not None:
                facts["tokens"] = tokens
            found = self._chosen[key] = operation.bind(x.device, **facts)
        return found

    def constants(self, device: torch.device) -> _Constants:
        """What the kernels need on a device, made at the first call."""
        made = self._constants.get(device)
        if made is None:
            with torch.inference_mode(False), torch.no_grad():
                made = self._constants[device] = self._make_constants(device)
        return made

    def _make_constants(self, device: torch.device) -> _Constants:
        (offset, sink, balance), (value_offset, *_) = self.keys(), self.values()
        frequencies, scale = None, 1.0
        if offset is not None and self.rotary is not None:
            frequencies, scale = self.rotary.frequencies(device)
        return _Constants(
            self.keys.signs(device),
            self.values.signs(device),
            None if offset is None else offset.to(device),
            None if sink is None else sink.to(device),
            None if balance is None else balance.to(device),
            None if value_offset is None else value_offset.to(device),
            frequencies,
            scale,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._constants = {}
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_constants": {}, "_chosen": {}}

    def follow(self, device: torch.device) -> None:
        """Have what a forward pass needs on a device, so that a compiled one finds it there."""
        if device.type == "meta":
            return
        if self.rotary is not None and self.keys.offset is not None:
            self.rotary.follow(device)
        for tensor in (self.keys, self.values):
            if tensor.scheme.rotate:
                tensor.rotation(device)

    def reads_codes(self, device: torch.device) -> bool:
        """Whether the attention is :mod:`.attention`'s and reads codes on this device."""
        if getattr(self._config, "_attn_implementation", None) != ATTENTION:
            return False
        if self.rotary is not None and self.keys.offset is not None and self.rotary.switch is not None:
            return False
        if self.keys.head_dim % 2 or self.keys.head_dim > 256:
            return False
        # What is asked for in a context cannot be traced.
        backend = None if is_compiling() else forced_backend()
        return backend == "triton" or (backend is None and device.type == "cuda")

    def attach(self, attention: nn.Module) -> None:
        """Become a submodule of ``attention`` and hook its forward pass."""
        attention.kv_quantizer = self
        self._config = getattr(attention, "config", None)
        self._hook = attention.register_forward_pre_hook(self._before_attention, with_kwargs=True)

    def detach(self, attention: nn.Module) -> None:
        """Undo :meth:`attach`: the attention's cache stays in 16 bits from now on."""
        self._hook.remove()
        del attention.kv_quantizer

    def encode(self, keys: Tensor, values: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """Everything a cache stores of new tokens; the token dimension is always the last but one.

        Args:
            keys: ``[batch, kv_heads, tokens, head_dim]`` after RoPE.
            values: the same shape.
            positions: int ``[batch, 1, tokens, 1]``.
        """
        if self.rotary is not None:
            positions = self.rotary.mark(positions)
        offset, balance = self._key_constants(keys, positions)
        keys = (keys.float() - offset) * balance
        values = values.float() - self._value_offset(values)
        stored = {f"key_{name}": tensor for name, tensor in self.keys.encode(keys).items()}
        stored.update({f"value_{name}": tensor for name, tensor in self.values.encode(values).items()})
        if self.keys.offset is not None and (self.rotary is not None or self.keys.sink is not None):
            stored["positions"] = positions
        return stored

    def decode(self, stored: dict[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values ``[batch, kv_heads, tokens, head_dim]`` that the stored tensors stand for."""
        keys = self.keys.decode(_part(stored, "key_"))
        offset, balance = self._key_constants(keys, stored.get("positions"))
        keys = keys / balance + offset
        values = self.values.decode(_part(stored, "value_"))
        values = values + self._value_offset(values)
        return keys.to(dtype), values.to(dtype)

    def _key_constants(self, keys: Tensor, positions: Tensor | None) -> tuple[Tensor | float, Tensor | float]:
        """What is taken off the keys, and what the rest is multiplied by."""
        offset, sink, balance = self.keys()
        factor = 1.0 if balance is None else balance.to(keys.device)[None, :, None, :]
        if offset is None:
            return 0.0, factor
        offset = offset.to(keys.device)[None, :, None, :]
        if sink is not None:
            assert positions is not None
            zeroth = (positions == 0) | (positions == -1)  # See KeyRotary.mark.
            offset = torch.where(zeroth, sink.to(keys.device)[None, :, None, :], offset)
        if self.rotary is None:
            return offset, factor
        assert positions is not None
        return self.rotary.apply(offset, positions), factor

    def _value_offset(self, values: Tensor) -> Tensor | float:
        offset = self.values()[0]
        return 0.0 if offset is None else offset.to(values.device)[None, :, None, :]

    def _before_attention(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        positions = kwargs.get("position_ids")
        cache = kwargs.get("past_key_values")
        hidden = args[0] if args else kwargs.get("hidden_states")
        if cache is None:
            if kwargs.get("cache") is not None:  # Of continuous batching: see .paged.
                return args, kwargs
            return args, {**kwargs, "past_key_values": NoCache(self, positions, self._reads_codes_of(hidden))}
        layer = self._cache_layer(cache, int(attention.layer_idx), hidden)  # type: ignore[arg-type]
        if layer is not None:
            layer.next_positions = positions
        return args, kwargs

    _before_attention.leaves_input = True  # type: ignore[attr-defined]  # See FusedLinears.takes_deferred.

    def _reads_codes_of(self, hidden: Any) -> bool:
        """:meth:`reads_codes` of an attention's input, which nothing is to be learned from."""
        return hidden is not None and not _trained(hidden) and self.reads_codes(hidden.device)

    def _cache_layer(self, cache: Any, index: int, hidden: Any) -> QuantizedCacheLayer | CodesLayer | None:
        """The quantized layer of a cache, put there if the cache is still empty at ``index``.

        ``hidden``: the attention's input.
        """
        if isinstance(cache, NoCache):
            return None
        layers = getattr(cache, "layers", None)
        if not isinstance(cache, Cache) or layers is None:
            return self._refuse(cache, type(cache).__name__)
        while len(layers) <= index and cache.layer_class_to_replicate is not None:
            layers.append(cache.layer_class_to_replicate())
        layer = layers[index]
        if isinstance(layer, QuantizedCacheLayer | CodesLayer):
            return layer
        codes = self._reads_codes_of(hidden) and not getattr(cache, "offloading", False)
        new = self.quantized(layer, codes)
        if new is None:
            return self._refuse(cache, type(layer).__name__)
        layers[index] = new
        return new

    def quantized(self, layer: Any, codes: bool) -> QuantizedCacheLayer | CodesLayer | None:
        """What takes the place of an empty layer of transformers; None where nothing can.

        ``codes``: see :meth:`reads_codes`.
        """
        if layer.is_initialized:
            return None
        sliding = type(layer) in (DynamicSlidingWindowLayer, StaticSlidingWindowLayer)
        if codes and (sliding or type(layer) in (DynamicLayer, StaticLayer)):
            return CodesLayer(
                self, _window(layer) if sliding else None, reserved=getattr(layer, "max_cache_len", 0)
            )
        if type(layer) is DynamicSlidingWindowLayer:
            return QuantizedSlidingLayer(self, layer.sliding_window, record_past=layer.record_past)
        return QuantizedCacheLayer(self) if type(layer) is DynamicLayer else None

    @staticmethod
    def _refuse(cache: Any, kind: str) -> None:
        if not getattr(cache, "_rrsq_refused", False):
            cache._rrsq_refused = True
            _say_that_it_stays(kind)


@torch.compiler.assume_constant_result  # Runs where it is traced, and is no part of what is compiled.
def _say_that_it_stays(kind: str) -> None:
    warnings.warn(
        f"The KV cache stays in 16 bits: '{kind}' cannot hold quantized keys and values. Leave the cache"
        " to generate(), or pass an empty DynamicCache or rrsq.KVCache.",
        stacklevel=2,
    )


def _trained(hidden: Any) -> bool:
    """Whether the input of an attention, or what stands in its place, wants a gradient."""
    return needs_gradient(hidden.joined if isinstance(hidden, Projections) else hidden)


def _window(layer: Any) -> int:
    """The window of a sliding layer; a static one holds no more than it."""
    return int(getattr(layer, "sliding_window", None) or layer.max_cache_len)


def _part(stored: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
