"""Rotary position embeddings (RoPE, arXiv 2104.09864) outside of an attention's own forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["KeyRotary"]


class KeyRotary:
    """RoPE as one layer's attention applies it to its keys.

    RoPE is linear in the key: ``RoPE(k) = RoPE(k - b) + RoPE(b)``. Channels beyond those that have angles
    are left alone (partial rotary embeddings).

    Args:
        module: the model's rotary embedding: ``(x, position_ids=...)`` to cosines and sines
            ``[batch, tokens, channels]``, both times the attention scaling of scaled RoPE.
        options: further keyword arguments that the module takes, such as the layer's type.
    """

    def __init__(self, module: nn.Module, **options: Any) -> None:
        self.module = module
        self.options = options

    def apply(self, keys: Tensor, positions: Tensor) -> Tensor:
        """RoPE of float32 ``keys`` ``[batch, kv_heads, tokens, head_dim]``; both leading sizes may be 1.

        Args:
            keys: what to rotate.
            positions: int ``[batch, 1, tokens, 1]``.
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
        cos, sin = self.module(keys, position_ids=positions[:, 0, :, 0], **self.options)
        return cos.unsqueeze(1), sin.unsqueeze(1)


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
