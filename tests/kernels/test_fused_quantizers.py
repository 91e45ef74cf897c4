"""Norms and gates into quantization: the references in parts, the kernels against the references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rrsq import kernels
from rrsq.kernels.gated_quantize import GATES
from rrsq.kernels.quantize_signed import rotate_blocks

from .problems import both, needs_triton, uneven_activations

CASES = [
    # channels, bits, group size, block, dtype
    (64, 4, 16, 16, torch.bfloat16),
    (288, 4, 16, 16, torch.float16),
    (96, 8, None, 16, torch.bfloat16),
    (80, 4, None, 1, torch.float32),
    (20, 4, 4, 4, torch.float32),
]
every_case = pytest.mark.parametrize(("channels", "bits", "group_size", "block", "dtype"), CASES)


def tokens(count: int, channels: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    return uneven_activations(count, channels, seed).clamp(-500, 500).to(device, dtype)


def gain(channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.exp(0.5 * torch.randn(channels, generator=generator)).to(device, dtype)


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """But for the last bit of a few activations: sums in another order, other exponentials."""
    operand, scale = actual[:2]
    torch.testing.assert_close(scale, expected[1], rtol=2**-7, atol=0)
    unequal = operand != expected[0]
    assert float(unequal.float().mean()) <= 0.01
    for rest, other in zip(actual[2:], expected[2:], strict=True):
        assert torch.equal(rest, other)


@pytest.mark.parametrize("late", [False, True])
def test_the_norm_s_reference_against_float64(late: bool) -> None:
    x, weight = uneven_activations(6, 96), gain(96, torch.float32, torch.device("cpu"))
    operand, scale = kernels.rms_norm_quantize.reference(x, weight, 1e-5, float(late), late, 8, None, 16)
    wide = x.double()
    normed = wide / (wide.square().mean(1, keepdim=True) + 1e-5).sqrt() * (float(late) + weight.double())
    error = (operand.double() * scale.double()[:, None] - rotate_blocks(normed.float(), 16).double()).abs()
    assert bool((error <= 0.501 * scale.double()[:, None]).all())


@pytest.mark.parametrize("activation", GATES)
def test_the_gate_s_reference_against_float64(activation: str) -> None:
    x = uneven_activations(6, 192).clamp(-30, 30)
    operand, scale = kernels.gated_quantize.reference(x, activation, 8, None, 16)
    gate, up = x.double().chunk(2, 1)
    if activation == "silu":
        gated = gate * torch.sigmoid(gate) * up
    else:
        inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
        gated = 0.5 * gate * (1 + torch.tanh(inner)) * up
    error = (operand.double() * scale.double()[:, None] - rotate_blocks(gated.float(), 16).double()).abs()
    assert bool((error <= 0.501 * scale.double()[:, None]).all())


@needs_triton
@pytest.mark.parametrize(("offset", "late"), [(0.0, False), (1.0, True)])
@every_case
def test_norms(
    channels: int,
    bits: int,
    group_size: int | None,
    block: int,
    dtype: torch.dtype,
    offset: float,
    late: bool,
    device: torch.device,
) -> None:
    x, weight = tokens(3, channels, dtype, device), gain(channels, dtype, device)
    x[1] = 0
    arguments = weight, 1e-5, offset, late, bits, group_size, block
    assert_same(*both(kernels.rms_norm_quantize, x, *arguments))
    residual = tokens(3, channels, dtype, device, seed=9)
    assert_same(*both(kernels.add_rms_norm_quantize, x, residual, *arguments))


@needs_triton
@pytest.mark.parametrize("activation", GATES)
@every_case
def test_gates(
    channels: int,
    bits: int,
    group_size: int | None,
    block: int,
    dtype: torch.dtype,
    activation: str,
    device: torch.device,
) -> None:
    x = tokens(3, 2 * channels, dtype, device).clamp(-100, 100)
    x[1] = 0
    assert_same(*both(kernels.gated_quantize, x, activation, bits, group_size, block))


@needs_triton
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_makes_the_token_s_scale_nan(value: float, device: torch.device) -> None:
    weight = gain(64, torch.bfloat16, device)
    x = tokens(3, 128, torch.bfloat16, device)
    x[1, 70] = value  # Of the second half: a gate of -inf would be a zero.
    hidden = x[:, 64:].contiguous()
    calls: list[Any] = [
        (kernels.rms_norm_quantize, (hidden, weight, 1e-5, 0.0, False, 4, 16, 16)),
        (kernels.add_rms_norm_quantize, (hidden, hidden, weight, 1e-5, 0.0, False, 4, 16, 16)),
        (kernels.gated_quantize, (x, "silu", 4, 16, 16)),
    ]
    for function, arguments in calls:
        for result in both(function, *arguments):
            assert result[1].isnan().tolist() == [False, True, False]


@needs_triton
def test_no_tokens(device: torch.device) -> None:
    x, weight = torch.empty(0, 64, device=device), torch.ones(64, device=device)
    for operand, scale in both(kernels.rms_norm_quantize, x, weight, 1e-5, 0.0, False, 4, 16, 16):
        assert operand.shape == (0, 64)
        assert scale.shape == (0,)
    for operand, _ in both(kernels.gated_quantize, x, "silu", 4, 16, 16):
        assert operand.shape == (0, 32)


def test_shapes_and_dtypes_of_the_fake_implementations() -> None:
    x, weight = torch.randn(5, 96, dtype=torch.bfloat16), torch.ones(96, dtype=torch.bfloat16)
    ops, heads = torch.ops.rrsq, torch.randn(2, 4, 3, 8)
    angles = torch.randn(1, 3, 8)
    cases: list[Any] = [
        (ops.rms_norm_quantize, (x, weight, 1e-5, 0.0, False, 4, 16, 16)),
        (ops.add_rms_norm_quantize, (x, x + 1, weight, 1e-5, 0.0, False, 8, None, 16)),
        (ops.gated_quantize, (x, "silu", 4, 16, 16)),
        (ops.rotary, (heads, heads[:, :2] + 1, angles, angles + 1)),
    ]
    with kernels.use_kernels("eager"):
        for op, arguments in cases:
            torch.library.opcheck(op.default, arguments, test_utils=["test_schema", "test_faketensor"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 16, 65, 2048])
@pytest.mark.parametrize("channels", [576, 4096, 8192, 14336, 28672])
def test_real_sizes(channels: int, count: int, dtype: torch.dtype, device: torch.device) -> None:
    x, weight = tokens(count, channels, dtype, device), gain(channels, dtype, device)
    arguments = weight, 1e-5, 0.0, False, 4, 16, 16
    assert_same(*both(kernels.rms_norm_quantize, x, *arguments))
    assert_same(*both(kernels.add_rms_norm_quantize, x, x.flip(0), *arguments))
    gate_up = tokens(count, 2 * channels, dtype, device).clamp(-100, 100)
    for activation in GATES:
        assert_same(*both(kernels.gated_quantize, gate_up, activation, 4, 16, 16))
