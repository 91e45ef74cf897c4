"""Quantization of tokens: the reference against plain loops in float64, the kernel against the reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rrsq import kernels

from .problems import (
    ROTATIONS,
    activations,
    assert_rounded,
    both,
    hadamard_12,
    needs_triton,
    uneven_activations,
)

quantize_tokens = kernels.quantize_tokens.reference


def quantized_by_loops(
    x: np.ndarray, group_size: int, clip: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scales ``a``, multipliers ``m`` a group and unrounded codes, as the docstring defines them."""
    tokens, channels = x.shape
    scale = np.zeros(tokens)
    multiplier = np.ones((tokens, channels // group_size))
    exact = np.zeros_like(x)
    for i in range(tokens):
        scale[i] = max(clip * np.abs(x[i]).max() / (18 * 7), 1e-30)
        for g in range(channels // group_size):
            group = slice(g * group_size, (g + 1) * group_size)
            ratio = clip * np.abs(x[i, group]).max() / (7 * scale[i])
            multiplier[i, g] = min(max(math.ceil(ratio - 1e-5), 1), 18)
            exact[i, group] = x[i, group] / (scale[i] * multiplier[i, g])
    return scale, multiplier, exact


@pytest.mark.parametrize("clip", [1.0, 0.9333, 0.6])
@pytest.mark.parametrize(("channels", "group_size"), [(16, 16), (32, 8), (48, 16), (10, 1), (64, 2)])
def test_groups_equal_the_loops(channels: int, group_size: int, clip: float) -> None:
    x = uneven_activations(9, channels, seed=channels)
    operand, scale = quantize_tokens(x, 4, group_size, clip)
    assert operand.dtype == torch.int8
    assert scale.dtype == torch.float32
    expected_scale, multiplier, exact = quantized_by_loops(x.double().numpy(), group_size, clip)
    np.testing.assert_allclose(scale.numpy(), expected_scale, rtol=1e-6)
    codes = operand.numpy() / multiplier.repeat(group_size, 1)
    assert (codes == np.round(codes)).all()
    assert_rounded(codes, exact, limit=7)


@given(
    tokens=st.integers(1, 4),
    groups=st.integers(1, 4),
    group_size=st.sampled_from([1, 2, 4, 16]),
    clip=st.sampled_from([1.0, 0.9]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=80, deadline=None)
def test_the_error_is_at_most_half_a_step(
    tokens: int, groups: int, group_size: int, clip: float, seed: int
) -> None:
    x = uneven_activations(tokens, groups * group_size, seed)
    operand, scale = quantize_tokens(x, 4, group_size, clip)
    assert int(operand.int().abs().max()) <= 126
    exact, a = x.double().numpy(), scale.double().numpy()[:, None]
    error = np.abs(exact - operand.numpy() * a)
    grouped = np.abs(exact).reshape(tokens, groups, group_size).max(2)
    m = np.clip(np.ceil(clip * grouped / (7 * a) - 1e-5), 1, 18).repeat(group_size, 1)
    clipped = np.maximum(np.abs(exact) - 7 * a * m, 0)
    assert (error <= np.maximum(a * m / 2, clipped) * (1 + 1e-5)).all()
    if clip == 1.0:
        assert (clipped <= 1e-5 * a * m).all()


@pytest.mark.parametrize("clip", [1.0, 0.9])
@pytest.mark.parametrize(("bits", "top"), [(4, 7), (8, 127)])
def test_one_scale_a_token(bits: int, top: int, clip: float) -> None:
    x = uneven_activations(11, 24)
    operand, scale = quantize_tokens(x, bits, None, clip)
    exact = x.double().numpy()
    expected = clip * np.abs(exact).max(1) / top
    np.testing.assert_allclose(scale.numpy(), expected, rtol=1e-6)
    assert_rounded(operand.numpy().astype(float), exact / expected[:, None], limit=top)


def test_a_zero_token_stays_zero_and_touches_no_other() -> None:
    x = uneven_activations(3, 32)
    alone = quantize_tokens(x[:1], 4, 8, 1.0)
    x[1] = 0
    operand, scale = quantize_tokens(x, 4, 8, 1.0)
    assert not operand[1].any()
    assert bool(torch.isfinite(scale).all())
    assert torch.equal(operand[:1], alone[0])
    assert torch.equal(scale[:1], alone[1])


def test_a_zero_group_stays_zero() -> None:
    x = uneven_activations(2, 32)
    x[:, 8:16] = 0
    assert not quantize_tokens(x, 4, 8, 1.0)[0][:, 8:16].any()


def test_one_huge_token_costs_the_others_nothing() -> None:
    x = uneven_activations(4, 32)
    before = quantize_tokens(x, 4, 16, 1.0)
    x[2] *= 1e6
    operand, scale = quantize_tokens(x, 4, 16, 1.0)
    others = torch.tensor([0, 1, 3])
    assert torch.equal(operand[others], before[0][others])
    assert torch.equal(scale[others], before[1][others])
    assert float((x[2] - operand[2] * scale[2]).abs().max()) <= float(x[2].abs().max()) / 14 * 1.001


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precisions_are_read_exactly(dtype: torch.dtype) -> None:
    x = uneven_activations(4, 32).to(dtype)
    for low, high in zip(quantize_tokens(x, 4, 8, 0.9), quantize_tokens(x.float(), 4, 8, 0.9), strict=True):
        assert torch.equal(low, high)


@needs_triton
@pytest.mark.parametrize("kind", ["random", "zero_rows", "huge_token", "huge_channel"])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 16), (4, None), (8, None), (4, 128)])
def test_quantize_tokens(kind, bits, group_size, device):
    x = activations(5, 384, kind, torch.bfloat16, device)
    (operand, scale), (expected, expected_scale) = both(kernels.quantize_tokens, x, bits, group_size, 0.95)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(operand, expected)


@needs_triton
@pytest.mark.parametrize("channels", [64, 576, 896, 4864])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_quantize_tokens_sizes(channels, dtype, device):
    x = activations(2, channels, "random", dtype, device)
    (operand, scale), (expected, expected_scale) = both(kernels.quantize_tokens, x, 4, 32, 1.0)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(operand, expected)


@needs_triton
@pytest.mark.parametrize(("channels", "name", "block", "inner"), ROTATIONS)
@pytest.mark.parametrize("kind", ["random", "zero_rows", "huge_channel"])
def test_rotate_and_quantize(channels, name, block, inner, kind, device):
    base = (hadamard_12() if name == "paley" else torch.ones(1, 1)).to(device, torch.int8)
    x = activations(3, channels, kind, torch.bfloat16, device)
    options = {"base": base, "hadamard_block": block, "hadamard_inner": inner}
    for group_size in (32, None):
        (operand, scale), (expected, expected_scale) = both(
            kernels.quantize_tokens, x, 4, group_size, 0.9, **options
        )
        assert torch.equal(scale, expected_scale)
        assert torch.equal(operand, expected)
