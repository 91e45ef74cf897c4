"""Random and adversarial activations and operands of a quantized linear, and its result in float64."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rrsq import kernels
from rrsq.kernels import pack_int4

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

_TIE = 1e-4
KINDS = ("random", "zero_rows", "huge_token", "saturated", "signed")


@dataclass
class Problem:
    """Operands of ``linear_int8`` and what it must give."""

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
        elif kind == "signed":
            signs = 2 * torch.randint(0, 2, shape, generator=generator, dtype=torch.int8) - 1
            multiplier = multiplier.to(torch.int8) * signs
            multiplier[:, 0], codes[:, 0] = -15, -8
    weight_scale = torch.rand(out_features, generator=generator) * 1e-3
    bias_values = torch.randn(out_features, generator=generator) if bias else None
    packed = pack_int4(codes)
    weight = codes.double()
    if multiplier is not None and group_size is not None:
        weight = weight * multiplier.double().repeat_interleave(group_size, 1)
    assert torch.equal(weight, kernels.weight_operand(packed, multiplier).double())
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


def assert_rounded_once(y: Tensor, expected: Tensor) -> None:
    """Within half a unit in the last place, and the error of a sum in float32.

    The interpreter does not round to bfloat16, but cuts off: there it is a whole unit.
    """
    units = 1.0 if y.dtype == torch.bfloat16 and y.device.type == "cpu" else 0.5
    magnitude = expected.abs().amax(1, keepdim=True)
    allowed = expected.abs() * (units * torch.finfo(y.dtype).eps) + magnitude * 1e-5
    assert bool(((y.double() - expected).abs() <= allowed).all())


class Weight:
    """Random codes, scales and (with groups of 16) multipliers, with the float64 matrix they stand for."""

    OUT = 20

    def __init__(self, in_features: int, grouped: bool, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(-8, 8, (self.OUT, in_features), generator=generator)
        self.packed = pack_int4(codes)
        self.scale = torch.rand(self.OUT, generator=generator) + 0.01
        self.multiplier: Tensor | None = None
        factor = np.ones((self.OUT, in_features))
        if grouped:
            self.multiplier = torch.randint(1, 16, (self.OUT, in_features // 16), generator=generator).byte()
            factor = self.multiplier.double().numpy().repeat(16, 1)
        self.operand = torch.from_numpy(codes.numpy() * factor).to(torch.int8)
        self.dense = codes.double().numpy() * factor * self.scale.double().numpy()[:, None]


def random_bias(has_bias: bool) -> Tensor | None:
    return torch.randn(Weight.OUT, generator=torch.Generator().manual_seed(9)) if has_bias else None


def assert_close(y: Tensor, expected: np.ndarray, tolerance: float = 1e-6) -> None:
    assert np.abs(y.double().numpy() - expected).max() <= tolerance * np.abs(expected).max()


def added(expected: np.ndarray, bias: Tensor | None) -> np.ndarray:
    return expected if bias is None else expected + bias.double().numpy()


def activations(
    tokens: int,
    channels: int,
    kind: str,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
) -> Tensor:
    """``kind``: ``random``, ``zero_rows``, ``huge_token`` or ``huge_channel``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, channels, generator=generator)
    if kind == "zero_rows":
        x[::2] = 0
    elif kind == "huge_token":
        x[0] *= 1e4
    elif kind == "huge_channel":
        x[:, 3] = 300.0
    return x.to(device, dtype)


def hadamard_12() -> Tensor:
    """Paley's matrix of order 12, from the squares modulo 11."""
    squares = {i * i % 11 for i in range(1, 11)}
    H = torch.ones(12, 12)
    for i in range(11):
        for j in range(11):
            difference = (j - i) % 11
            H[i + 1, j + 1] = -1 if difference == 0 else (1 if difference in squares else -1)
    H[1:, 0] = -1
    H = torch.where(torch.eye(12).bool() & (torch.arange(12) > 0), torch.ones(()), H)
    assert torch.equal(H @ H.T, 12 * torch.eye(12))
    return H


def both(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, Any]:
    """What the Triton kernel and the reference give."""
    with kernels.use_kernels("triton"):
        actual = function(*arguments, **options)
    with kernels.use_kernels("eager"):
        return actual, function(*arguments, **options)


ROTATIONS = [
    # channels, base, block, inner
    (192, "paley", 192, 1),
    (384, "paley", 192, 1),
    (1536, "paley", 1536, 1),
    (256, "one", 256, 1),
    (2048, "one", 2048, 1),
    (256, "one", 64, 1),
    (192, "paley", 12, 16),
    (128, "one", 4, 32),
]


def uneven_activations(tokens: int, channels: int, seed: int = 0) -> Tensor:
    """Gaussian rows of very different sizes with a few large channels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, channels, generator=generator)
    x *= torch.exp(2 * torch.randn(tokens, 1, generator=generator))
    x[:, :: max(channels // 4, 1)] *= 6.0
    return x


def assert_rounded(codes: np.ndarray, exact: np.ndarray, limit: int) -> None:
    """``codes`` are ``exact`` rounded and limited; either neighbour is right at a tie."""
    assert np.abs(codes).max(initial=0) <= limit
    assert (np.abs(codes - np.clip(exact, -limit, limit)) <= 0.5 + _TIE).all()
