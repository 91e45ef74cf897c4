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
        switch: the number of tokens beyond which all tokens of a call get other angles (``longrope``,
            arXiv 2402.13753), or None.
        fixed: the angle of a position is always the same.
        options: further keyword arguments that the module takes, such as the layer's type.
    """

    def __init__(
        self, module: nn.Module, switch: int | None = None, fixed: bool = True, **options: Any
    ) -> None:
        self.module = module
        self.switch = switch
        self.fixed = fixed and switch is None
        self.options = options

    def frequencies(self, device: torch.device) -> tuple[Tensor, float]:
        """Radians a position of each pair of channels, float64 ``[channels / 2]``, and the attention scaling.

        Read off the angles of position 1, so that it does not matter where a module keeps them.
        """
        inside = next(self.module.buffers(), None)
        where = device if inside is None else inside.device
        positions = torch.arange(2, device=where).unsqueeze(0)
        x = torch.zeros(1, 2, 1, device=where)
        cos, sin = (angle[0].double() for angle in self.module(x, position_ids=positions, **self.options))
        turned = torch.atan2(sin[1], cos[1])[: cos.shape[-1] // 2]
        return turned.to(device), float(cos[0, 0])

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
        position_ids = positions[:, 0, :, 0]
        if self.switch is None:
            cos, sin = self.module(keys, position_ids=position_ids, **self.options)
            return cos.unsqueeze(1), sin.unsqueeze(1)
        # The module chooses by the largest position it is given.
        long = position_ids < 0
        position_ids = torch.where(long, -1 - position_ids, position_ids)
        beyond = torch.cat((position_ids, torch.full_like(position_ids[:, :1], self.switch)), dim=1)
        of_long = self.module(keys, position_ids=beyond, **self.options)
        of_short = self.module(keys, position_ids=position_ids.clamp(max=self.switch - 1), **self.options)
        cos, sin = (
            torch.where(long.unsqueeze(-1), a[:, :-1], b) for a, b in zip(of_long, of_short, strict=True)
        )
        return cos.unsqueeze(1), sin.unsqueeze(1)


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
