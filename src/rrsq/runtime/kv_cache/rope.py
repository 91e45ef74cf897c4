"""Rotary position embeddings (RoPE, arXiv 2104.09864) outside of an attention's own forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedArchitectureError

__all__ = ["KeyRotary"]


class KeyRotary:
    """RoPE as one layer's attention applies it to its keys.

    RoPE is linear in the key: ``RoPE(k) = RoPE(k - b) + RoPE(b)``. Channels beyond those that have angles
    are left alone (partial rotary embeddings). The frequencies are tensors of its own, in float32, which go
    where the keys are: the model's rotary embedding may be cast, be on another device or be offloaded.

    Args:
        frequency: of each pair of channels, ``[channels / 2]``.
        scaling: what cosines and sines are multiplied by, the attention scaling of scaled RoPE.
        long: the same as ``frequency`` for calls that reach ``switch``, or None.
        switch: the number of tokens beyond which all tokens of a call get other angles (``longrope``,
            arXiv 2402.13753), or None.
    """

    def __init__(
        self,
        frequency: Tensor,
        scaling: float = 1.0,
        *,
        long: Tensor | None = None,
        switch: int | None = None,
    ) -> None:
        self.frequency = frequency.float()
        self.long = None if long is None else long.float()
        self.scaling = scaling
        self.switch = switch

    @classmethod
    def of(cls, kind: Callable[..., Any], config: Any, layer_type: str | None = None) -> KeyRotary:
        """What a model's rotary embedding does, read off one that is made anew of the configuration.

        Args:
            kind: its class: made of a configuration, it has ``inv_freq`` and ``attention_scaling``, as
                those of transformers have.
            config: the configuration of the language model.
            layer_type: the layer's, where RoPE differs by type.

        Raises:
            UnsupportedArchitectureError: the class is of another kind.
        """
        rope = getattr(config, "rope_parameters", None) or {}
        prefix, options = "", {}
        if layer_type is not None:
            rope, prefix, options = rope[layer_type], f"{layer_type}_", {"layer_type": layer_type}
        try:
            with torch.inference_mode(False), torch.device("cpu"):
                module = kind(config)
                frequency = getattr(module, f"{prefix}inv_freq").clone()
                scaling = float(getattr(module, f"{prefix}attention_scaling"))
                if rope.get("rope_type") != "longrope":
                    return cls(frequency, scaling)
                switch = rope["original_max_position_embeddings"]
                # The module takes the frequencies of long texts over when it is called with one.
                module(torch.zeros(1), position_ids=torch.tensor([[switch]]), **options)
                long = getattr(module, f"{prefix}inv_freq").clone()
        except (AttributeError, KeyError, TypeError) as error:
            raise UnsupportedArchitectureError(
                f"The rotary embedding '{kind.__name__}' cannot be read ({error}). It has to be made of the"
                " configuration alone and to have 'inv_freq' and 'attention_scaling', as those of"
                " transformers have."
            ) from error
        return cls(frequency, scaling, long=long, switch=switch)

    def for_all(self, tokens: int) -> KeyRotary:
        """The same with the angles of calls of ``tokens`` tokens for all calls."""
        if self.switch is None or self.long is None:
            return self
        return KeyRotary(self.long if tokens > self.switch else self.frequency, self.scaling)

    def follow(self, device: torch.device) -> None:
        """Have the frequencies where the keys are, so that a compiled forward pass finds them there."""
        if device.type != "meta" and self.frequency.device != device:
            with torch.inference_mode(False):
                self.long = None if self.long is None else self.long.to(device)
                self.frequency = self.frequency.to(device)

    def frequencies(self, device: torch.device) -> tuple[Tensor, float]:
        """Radians a position of each pair of channels, float64 ``[channels / 2]``, and the scaling."""
        return self.frequency.to(device, torch.float64), self.scaling

    def mark(self, positions: Tensor) -> Tensor:
        """The positions of one call, ``p``, as ``-1 - p`` where the call gets the angles of long texts."""
        if self.switch is None:
            return positions
        return torch.where(positions.max() >= self.switch, -1 - positions, positions)

    def apply(self, keys: Tensor, positions: Tensor) -> Tensor:
        """RoPE of float32 ``keys`` ``[batch, kv_heads, tokens, head_dim]``; both leading sizes may be 1.

        Args:
            keys: what to rotate.
            positions: int ``[batch, 1, tokens, 1]`` from :meth:`mark`.
        """
        cos, sin = self._angles(keys, positions)
        turned, rest = keys.split((cos.shape[-1], keys.shape[-1] - cos.shape[-1]), dim=-1)
        turned = turned * cos + _rotate_half(turned) * sin
        return torch.cat((turned, rest.expand(*turned.shape[:-1], -1)), dim=-1)

    def undo(self, keys: Tensor, positions: Tensor) -> Tensor:
        """The keys that :meth:`apply` makes ``keys`` of."""
        cos, sin = self._angles(keys, positions)
        turned, rest = keys.split((cos.shape[-1], keys.shape[-1] - cos.shape[-1]), dim=-1)
        turned = (turned * cos - _rotate_half(turned) * sin) / (cos.square() + sin.square())
        return torch.cat((turned, rest.expand(*turned.shape[:-1], -1)), dim=-1)

    def _angles(self, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[batch, 1, tokens, channels]`` in float32."""
        self.follow(keys.device)
        frequency = self.frequency.to(keys.device)
        if self.long is not None:
            beyond = positions < 0
            positions = torch.where(beyond, -1 - positions, positions)
            frequency = torch.where(beyond, self.long.to(keys.device), frequency)
        angle = positions.float() * frequency
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos() * self.scaling, angle.sin() * self.scaling


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
