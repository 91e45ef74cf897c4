"""Random inputs of a linear, in as many copies as it takes to leave the caches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rrsq import kernels

from .linear_scheme import LinearScheme
from .shapes import LinearShape

__all__ = ["Problem", "make_problems"]

_BYTES_PAST_THE_CACHES = 160 << 20
_MOST_COPIES = 16


@dataclass(frozen=True)
class Problem:
    """Activations, a packed weight, and that weight in floating point."""

    shape: LinearShape
    scheme: LinearScheme
    """With group sizes that divide the shape's channels."""
    x: Tensor
    """bfloat16 ``[tokens, in]``."""
    weight: Tensor
    """bfloat16 ``[out, in]``: what the packed weight stands for."""
    packed: Tensor
    multiplier: Tensor | None
    weight_scale: Tensor
    unpacked: Tensor | None
    """The int8 operand of the weight, which modules keep on a CPU; None elsewhere."""
    base: Tensor | None
    """Base of the online rotation, or None."""


def _copies(tokens: int, shape: LinearShape, device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    # The packed weight is the smallest that any contender reads of a weight.
    size = shape.out_features * shape.in_features // 2 + tokens * shape.in_features
    return min(max(-(-_BYTES_PAST_THE_CACHES // size), 2), _MOST_COPIES)


def make_problems(
    tokens: int, shape: LinearShape, device: torch.device, scheme: LinearScheme, seed: int = 0
) -> list[Problem]:
    """Draw independent copies of a problem: normal activations, uniform codes and multipliers."""
    generator = torch.Generator(device).manual_seed(seed)
    base = _rotation_base(shape, device)
    fitting = scheme.for_channels(shape.in_features)
    return [
        _draw(tokens, shape, fitting, device, generator, base) for _ in range(_copies(tokens, shape, device))
    ]


def _draw(
    tokens: int,
    shape: LinearShape,
    scheme: LinearScheme,
    device: torch.device,
    generator: torch.Generator,
    base: Tensor | None,
) -> Problem:
    n, k = shape.out_features, shape.in_features
    x = torch.randn(tokens, k, device=device, generator=generator).to(torch.bfloat16)
    packed = torch.randint(0, 256, (n, k // 2), device=device, dtype=torch.uint8, generator=generator)
    multiplier = None
    if scheme.weight_group_size is not None:
        groups = (n, k // scheme.weight_group_size)
        multiplier = torch.randint(1, 16, groups, device=device, dtype=torch.uint8, generator=generator)
    weight_scale = (torch.rand(n, device=device, generator=generator) + 0.5) / (40.0 * k**0.5)
    operand = kernels.weight_operand(packed, multiplier)
    weight = (operand.float() * weight_scale[:, None]).to(torch.bfloat16)
    unpacked = operand if device.type == "cpu" else None
    return Problem(shape, scheme, x, weight, packed, multiplier, weight_scale, unpacked, base)


def _rotation_base(shape: LinearShape, device: torch.device) -> Tensor | None:
    if not shape.rotated:
        return None
    from rrsq.runtime.rotation.hadamard import base_matrix, plan_hadamard

    plan = plan_hadamard(shape.in_features)
    if plan.block != shape.in_features:
        return None
    return base_matrix(plan).to(device=device, dtype=torch.float32)
