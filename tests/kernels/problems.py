"""Random and adversarial operands of a quantized linear, and its result in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rrsq.kernels import pack_int4
from rrsq.kernels.packing import weight_operand

KINDS = ("random", "zero_rows", "huge_token", "saturated")


@dataclass
class Problem:
    """Operands of ``linear_folded`` and what it must give."""

    operand: Tensor
    scale: Tensor
    packed: Tensor
    weight_scale: Tensor
    multiplier: Tensor | None
    bias: Tensor | None
    expected: Tensor


def make_problem(
    tokens: int,
    out_features: int,
    in_features: int,
    group_size: int | None = 32,
    bias: bool = True,
    kind: str = "random",
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Problem:
    """Draw a problem; ``expected`` is float64, from Python's integers through float64 products."""
    generator = torch.Generator().manual_seed(seed)
    operand = torch.randint(-126, 127, (tokens, in_features), generator=generator, dtype=torch.int8)
    codes = torch.randint(-8, 8, (out_features, in_features), generator=generator)
    scale = torch.rand(tokens, generator=generator) + 0.1
    if kind == "zero_rows":
        operand[::2] = 0
        codes[::3] = 0
    elif kind == "huge_token":
        scale[0] = 1e6
    elif kind == "saturated":
        operand = torch.full_like(operand, -126)
        codes = torch.full_like(codes, -8)
    multiplier = None
    if group_size is not None:
        shape = (out_features, in_features // group_size)
        multiplier = torch.randint(1, 16, shape, generator=generator, dtype=torch.uint8)
        if kind == "saturated":
            multiplier.fill_(15)
    weight_scale = torch.rand(out_features, generator=generator) * 1e-3
    bias_values = torch.randn(out_features, generator=generator) if bias else None
    packed = pack_int4(codes)
    weight = codes.double()
    if multiplier is not None and group_size is not None:
        weight = weight * multiplier.double().repeat_interleave(group_size, 1)
    assert torch.equal(weight, weight_operand(packed, multiplier).double())
    expected = (operand.to(device).double() @ weight.to(device).T).cpu()
    expected = expected * scale.double()[:, None] * weight_scale.double()
    if bias_values is not None:
        expected = expected + bias_values.double()

    def move(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    return Problem(
        operand.to(device),
        scale.to(device),
        packed.to(device),
        weight_scale.to(device),
        move(multiplier),
        move(bias_values),
        expected.to(device),
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest error over the largest magnitude of its row; NaN and Inf give infinity."""
    if not bool(torch.isfinite(actual).all()):
        return float("inf")
    magnitude = expected.abs().amax(1, keepdim=True).clamp_min(1e-12)
    return float(((actual.double() - expected).abs() / magnitude).max())
