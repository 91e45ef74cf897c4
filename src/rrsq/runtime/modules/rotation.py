"""Online rotation of a linear's input."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ... import kernels
from ...models import LinearInput
from ..rotation.hadamard import HadamardPlan, base_matrix
from ..rotation.rotations import Rotations
from .gradient import StraightThrough, needs_gradient
from .prepared import Prepared

__all__ = ["OnlineHadamard", "RotatedLinear", "online_rotation", "rotated_input"]


@lru_cache(maxsize=64)
def _shared_base(plan: HadamardPlan, device: torch.device) -> Tensor:
    """One tensor for all layers: kernels keep what they derive from it by the tensor."""
    with torch.inference_mode(False), torch.device("cpu"):
        return base_matrix(plan).to(device)


class OnlineHadamard(nn.Module):
    """``x @ R`` with ``R = kron(H, I_inner)``, ``H`` a plan's orthonormal (block-diagonal) Hadamard matrix.

    ``inner = 1`` rotates the channels themselves (R4); ``inner = head_dim`` rotates the index of the heads
    of o_proj's input. The matrix is derived from the plan, so nothing is stored in a checkpoint.
    """

    def __init__(self, plan: HadamardPlan, inner: int = 1) -> None:
        super().__init__()
        self.plan = plan
        self.inner = inner
        self._base = _shared_base(plan, torch.device("cpu"))
        self._prepared = Prepared[Callable[[Tensor], Tensor]]()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": Prepared[Any]()}

    def base(self, device: torch.device) -> Tensor:
        """The dense ±1 base ``[k, k]`` in float32 on ``device``."""
        if self._base.device != device:
            self._base, self._prepared = _shared_base(self.plan, device), Prepared()
        return self._base

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.follow(fn(torch.empty(0)).device)
        return super()._apply(fn, recurse)

    def follow(self, device: torch.device) -> None:
        """Have the base where the model is, so that a compiled forward pass finds it there."""
        if device.type != "meta":
            self.base(device)

    def forward(self, x: Tensor) -> Tensor:
        """``x @ R`` for ``x`` ``[..., size * inner]``; float32 for lower precisions."""
        if needs_gradient(x):
            return StraightThrough.apply(x, self.forward, self.inverse)
        base = self.base(x.device)
        if is_compiling() or type(x) is not Tensor or not x.numel():
            return self._transform(x, base)
        return self._prepared.find(x, self._prepare)(x)

    def _prepare(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        return kernels.hadamard_transform.prepare(x, self._base, self.plan.block, self.inner)

    def inverse(self, x: Tensor) -> Tensor:
        """``x @ Rᵀ``: undoes :meth:`forward`."""
        return self._transform(x, self.base(x.device).t())

    def _transform(self, x: Tensor, base: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return kernels.hadamard_transform(rows, base, self.plan.block, self.inner).view(x.shape)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"size={self.plan.size}, block={self.plan.block}, base={self.plan.base}, inner={self.inner}"


class RotatedLinear(nn.Module):
    """A full-precision linear behind an online rotation, as it stands between folding and quantization.

    Args:
        rotation: of the input.
        linear: with a ``weight`` ``[..., out, in]`` and a ``bias``.
    """

    def __init__(self, rotation: OnlineHadamard, linear: Any) -> None:
        super().__init__()
        self.rotation = rotation
        self.linear = linear

    @property
    def weight(self) -> Tensor:
        """The folded weight ``[..., out, in]``."""
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias ``[out]`` or None."""
        return self.linear.bias

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """Rotate, then apply the linear, in its dtype; it gets all further arguments."""
        return self.linear(self.rotation(x).to(self.linear.weight.dtype), *args)


def rotated_input(linear: nn.Module, x: Tensor) -> Tensor:
    """What a linear multiplies when it is given ``x``: behind its online rotation, if it has one."""
    return linear.rotation(x) if isinstance(linear, RotatedLinear) else x


def online_rotation(entry: LinearInput, rotations: Rotations, channels: int) -> OnlineHadamard | None:
    """The online rotation of an input of this many channels, or None."""
    if rotations.blocks is not None:
        block = math.gcd(rotations.blocks, channels)
        return OnlineHadamard(HadamardPlan(channels, block, 1)) if block > 1 else None
    plans = {"o": rotations.across_heads, "down": rotations.intermediate_of(channels)}
    plan = plans.get(entry.name, rotations.residual_online)
    return None if plan is None else OnlineHadamard(plan, inner=channels // plan.size)
