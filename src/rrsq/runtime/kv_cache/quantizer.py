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
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from ...kernels.cache import decode_cache, encode_cache
from ..rotation.hadamard import orthonormal, plan_hadamard
from .layers import NoCache, QuantizedCacheLayer, QuantizedSlidingLayer
from .rope import KeyRotary

__all__ = ["CacheScheme", "KVQuantizer"]


@dataclass(frozen=True)
class CacheScheme:
    """How keys or values are stored; see :class:`rrsq.recipe.CacheTensor`."""

    bits: int
    group_size: int
    zero_point: bool
    rotate: bool
    offset: bool


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

    def __init__(self, scheme: CacheScheme, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.scheme = scheme
        self.group_size = math.gcd(scheme.group_size, head_dim)
        self.head_dim = head_dim
        self.register_buffer("offset", torch.zeros(kv_heads, head_dim) if scheme.offset else None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # The offset stays float32 whatever dtype the model is cast to.
        offset = self.offset
        module = super()._apply(fn, recurse)
        if offset is not None and self.offset is not None and self.offset.dtype != torch.float32:
            self.offset = offset.to(self.offset.device)
        return module

    def forward(self) -> Tensor | None:
        """The offset, where the model runs: a call brings it there from where accelerate has offloaded it."""
        return self.offset

    def set_bits(self, bits: int) -> None:
        """Store ``bits`` a code from now on."""
        self.scheme = replace(self.scheme, bits=bits)

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """Codes, scales and minima of ``x``, from which its offset has been taken."""
        x = x.float()
        if self.scheme.rotate:
            x = x @ _head_rotation(self.head_dim, x.device)
        codes, scale, minimum = encode_cache(x, self.scheme.bits, self.group_size, self.scheme.zero_point)
        stored = {"codes": codes, "scale": scale}
        return stored if minimum is None else {**stored, "minimum": minimum}

    def decode(self, stored: dict[str, Tensor]) -> Tensor:
        """float32 ``[batch, kv_heads, tokens, head_dim]``, without the offset."""
        x = decode_cache(stored["codes"], stored["scale"], stored.get("minimum"), self.scheme.bits)
        return x @ _head_rotation(self.head_dim, x.device).t() if self.scheme.rotate else x


class KVQuantizer(nn.Module):
    """Quantizes the keys and values of one attention.

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

    def attach(self, attention: nn.Module) -> None:
        """Become a submodule of ``attention`` and hook its forward pass."""
        attention.kv_quantizer = self
        attention.register_forward_pre_hook(self._before_attention, with_kwargs=True)

    def encode(self, keys: Tensor, values: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """Everything a cache stores of new tokens; the token dimension is always the last but one.

        Args:
            keys: ``[batch, kv_heads, tokens, head_dim]`` after RoPE.
            values: the same shape.
            positions: int ``[batch, 1, tokens, 1]``.
        """
        if self.rotary is not None:
            positions = self.rotary.mark(positions)
        keys = keys.float() - self._key_offset(keys, positions)
        values = values.float() - self._value_offset(values)
        stored = {f"key_{name}": tensor for name, tensor in self.keys.encode(keys).items()}
        stored.update({f"value_{name}": tensor for name, tensor in self.values.encode(values).items()})
        if self.keys.offset is not None and self.rotary is not None:
            stored["positions"] = positions
        return stored

    def decode(self, stored: dict[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values ``[batch, kv_heads, tokens, head_dim]`` that the stored tensors stand for."""
        keys = self.keys.decode(_part(stored, "key_"))
        keys = keys + self._key_offset(keys, stored.get("positions"))
        values = self.values.decode(_part(stored, "value_"))
        values = values + self._value_offset(values)
        return keys.to(dtype), values.to(dtype)

    def _key_offset(self, keys: Tensor, positions: Tensor | None) -> Tensor | float:
        offset = self.keys()
        if offset is None:
            return 0.0
        offset = offset.to(keys.device)[None, :, None, :]
        if self.rotary is None:
            return offset
        assert positions is not None
        return self.rotary.apply(offset, positions)

    def _value_offset(self, values: Tensor) -> Tensor | float:
        offset = self.values()
        return 0.0 if offset is None else offset.to(values.device)[None, :, None, :]

    def _before_attention(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        positions = kwargs.get("position_ids")
        cache = kwargs.get("past_key_values")
        if cache is None:
            return args, {**kwargs, "past_key_values": NoCache(self, positions)}
        layer = self._cache_layer(cache, int(attention.layer_idx))  # type: ignore[arg-type]
        if layer is not None:
            layer.next_positions = positions
        return args, kwargs

    def _cache_layer(self, cache: Any, index: int) -> QuantizedCacheLayer | None:
        """The quantized layer of a cache, put there if the cache is still empty at ``index``."""
        if isinstance(cache, NoCache):
            return None
        layers = getattr(cache, "layers", None)
        if not isinstance(cache, Cache) or layers is None:
            return self._refuse(type(cache).__name__)
        while len(layers) <= index and cache.layer_class_to_replicate is not None:
            layers.append(cache.layer_class_to_replicate())
        layer = layers[index]
        if isinstance(layer, QuantizedCacheLayer):
            return layer
        if layer.is_initialized or type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return self._refuse(type(layer).__name__)
        if isinstance(layer, DynamicSlidingWindowLayer):
            layers[index] = QuantizedSlidingLayer(self, layer.sliding_window, record_past=layer.record_past)
        else:
            layers[index] = QuantizedCacheLayer(self)
        return layers[index]

    @staticmethod
    def _refuse(kind: str) -> None:
        warnings.warn(
            f"The KV cache stays in 16 bits: '{kind}' cannot hold quantized keys and values. Leave the cache"
            " to generate(), or pass an empty DynamicCache.",
            stacklevel=2,
        )


def _part(stored: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
