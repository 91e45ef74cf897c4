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
from transformers.cache_utils import Cache, DynamicLayer

from ..kernels.eager.cache import decode_cache, encode_cache
from ..rotation.hadamard import orthonormal, plan_hadamard

__all__ = ["CacheScheme", "KVQuantizer", "QuantizedCacheLayer"]


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
        rotary: the model's rotary embedding, which gives the angles of a position; used to put back a key
            offset that was taken off before RoPE (RoPE is linear: ``RoPE(k) = RoPE(k - b) + RoPE(b)``).
    """

    def __init__(
        self, keys: CacheScheme, values: CacheScheme, kv_heads: int, head_dim: int, rotary: nn.Module
    ) -> None:
        super().__init__()
        self.keys = CacheTensorQuantizer(keys, kv_heads, head_dim)
        self.values = CacheTensorQuantizer(values, kv_heads, head_dim)
        self._rotary = (rotary,)

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
        keys = keys.float() - self._key_offset(keys, positions)
        values = values.float() - self._value_offset()
        stored = {f"key_{name}": tensor for name, tensor in self.keys.encode(keys).items()}
        stored.update({f"value_{name}": tensor for name, tensor in self.values.encode(values).items()})
        if self.keys.offset is not None:
            stored["positions"] = positions
        return stored

    def decode(self, stored: dict[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values ``[batch, kv_heads, tokens, head_dim]`` that the stored tensors stand for."""
        keys = self.keys.decode(_part(stored, "key_"))
        keys = keys + self._key_offset(keys, stored.get("positions"))
        values = self.values.decode(_part(stored, "value_")) + self._value_offset()
        return keys.to(dtype), values.to(dtype)

    def _key_offset(self, keys: Tensor, positions: Tensor | None) -> Tensor | float:
        if self.keys.offset is None or positions is None:
            return 0.0
        cos, sin = self._rotary[0](keys, position_ids=positions[:, 0, :, 0])
        offset = self.keys.offset.to(keys.device)[None, :, None, :]
        rotated_half = torch.cat((-offset.chunk(2, -1)[1], offset.chunk(2, -1)[0]), dim=-1)
        return offset * cos.unsqueeze(1) + rotated_half * sin.unsqueeze(1)

    def _value_offset(self) -> Tensor | float:
        return 0.0 if self.values.offset is None else self.values.offset[None, :, None, :]

    def _before_attention(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        positions = kwargs.get("position_ids")
        cache = kwargs.get("past_key_values")
        if cache is None:
            return args, {**kwargs, "past_key_values": _NoCache(self, positions)}
        layer = self._cache_layer(cache, int(attention.layer_idx))  # type: ignore[arg-type]
        if layer is not None:
            layer.next_positions = positions
        return args, kwargs

    def _cache_layer(self, cache: Any, index: int) -> QuantizedCacheLayer | None:
        """The quantized layer of a cache, put there if the cache is still empty at ``index``."""
        if isinstance(cache, _NoCache):
            return None
        layers = getattr(cache, "layers", None)
        if not isinstance(cache, Cache) or layers is None:
            return self._refuse(type(cache).__name__)
        while len(layers) <= index and cache.layer_class_to_replicate is not None:
            layers.append(cache.layer_class_to_replicate())
        layer = layers[index]
        if isinstance(layer, QuantizedCacheLayer):
            return layer
        if type(layer) is not DynamicLayer or layer.is_initialized:
            return self._refuse(type(layer).__name__)
        layers[index] = QuantizedCacheLayer(self)
        return layers[index]

    @staticmethod
    def _refuse(kind: str) -> None:
        warnings.warn(
            f"The KV cache stays in 16 bits: '{kind}' cannot hold quantized keys and values. Leave the cache"
            " to generate(), or pass an empty DynamicCache.",
            stacklevel=2,
        )


class QuantizedCacheLayer(DynamicLayer):
    """One layer's keys and values in 4 (or 8) bits, growing with the tokens.

    :meth:`update` stores the new tokens quantized and returns all keys and values dequantized, the new ones
    included: attention never sees a key or value that was not quantized.
    """

    keys: Tensor | None
    values: Tensor | None

    def __init__(self, quantizer: KVQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.next_positions: Tensor | None = None
        self.stored: dict[str, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held for all cached tokens."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.stored.values())

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append tokens ``[batch, kv_heads, new, head_dim]``; return all keys and values in their dtype."""
        self.dtype, self.device = key_states.dtype, key_states.device
        positions = _positions(self.next_positions, key_states, self.get_seq_length())
        new = self.quantizer.encode(key_states, value_states, positions)
        if self.is_initialized:
            new = {name: torch.cat((self.stored[name], tensor), dim=-2) for name, tensor in new.items()}
        self._store(new)
        return self.quantizer.decode(self.stored, key_states.dtype)

    def get_seq_length(self) -> int:
        """Tokens stored."""
        return self.stored["key_codes"].shape[-2] if self.is_initialized else 0

    def reset(self) -> None:
        """Forget all tokens."""
        self.stored = {}
        self.keys = self.values = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens; a positive number is the length to keep."""
        if not self.is_initialized or tokens_to_remove == 0:
            return
        length = tokens_to_remove if tokens_to_remove > 0 else self.get_seq_length() + tokens_to_remove
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

    def _map(self, change: Any) -> None:
        if self.is_initialized:
            self._store({name: change(tensor) for name, tensor in self.stored.items()})

    def _store(self, stored: dict[str, Tensor]) -> None:
        self.stored = stored
        self.keys, self.values = stored["key_codes"], stored["value_codes"]
        self.is_initialized = True


class _NoCache:
    """Stands where a cache would, for a forward pass that keeps none: quantizes and returns at once."""

    def __init__(self, quantizer: KVQuantizer, positions: Tensor | None) -> None:
        self.quantizer = quantizer
        self.positions = positions

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        positions = _positions(self.positions, keys, 0)
        return self.quantizer.decode(self.quantizer.encode(keys, values, positions), keys.dtype)


def _positions(position_ids: Tensor | None, keys: Tensor, seen: int) -> Tensor:
    """Positions of new tokens as int32 ``[batch, 1, tokens, 1]``."""
    batch, _, tokens, _ = keys.shape
    if position_ids is None:
        position_ids = torch.arange(seen, seen + tokens, device=keys.device).unsqueeze(0)
    return position_ids.to(torch.int32).expand(batch, tokens)[:, None, :, None]


def _part(stored: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
