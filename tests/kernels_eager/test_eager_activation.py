"""The activation quantizers against plain loops in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rrsq.kernels.eager.activation import quantize_folded, quantize_smoothed

TIE = 1e-4


def activations(tokens: int, channels: int, seed: int = 0) -> Tensor:
    """Gaussian rows of very different sizes with a few large channels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, channels, generator=generator)
    x *= torch.exp(2 * torch.randn(tokens, 1, generator=generator))
    x[:, :: max(channels // 4, 1)] *= 6.0
    return x


def assert_rounded(codes: np.ndarray, exact: np.ndarray, limit: int) -> None:
    """``codes`` are ``exact`` rounded and limited; either neighbour is right at a tie."""
    assert np.abs(codes).max(initial=0) <= limit
    assert (np.abs(codes - np.clip(exact, -limit, limit)) <= 0.5 + TIE).all()


def folded_by_loops(x: np.ndarray, group_size: int, clip: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
def test_folded_equals_the_loops(channels: int, group_size: int, clip: float) -> None:
    x = activations(9, channels, seed=channels)
    operand, scale = quantize_folded(x, 4, group_size, clip)
    assert operand.dtype == torch.int8
    assert scale.dtype == torch.float32
    expected_scale, multiplier, exact = folded_by_loops(x.double().numpy(), group_size, clip)
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
def test_folded_error_is_at_most_half_a_step(
    tokens: int, groups: int, group_size: int, clip: float, seed: int
) -> None:
    x = activations(tokens, groups * group_size, seed)
    operand, scale = quantize_folded(x, 4, group_size, clip)
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
    x = activations(11, 24)
    operand, scale = quantize_folded(x, bits, None, clip)
    exact = x.double().numpy()
    expected = clip * np.abs(exact).max(1) / top
    np.testing.assert_allclose(scale.numpy(), expected, rtol=1e-6)
    assert_rounded(operand.numpy().astype(float), exact / expected[:, None], limit=top)


def test_a_zero_token_stays_zero_and_touches_no_other() -> None:
    x = activations(3, 32)
    alone = quantize_folded(x[:1], 4, 8, 1.0)
    x[1] = 0
    operand, scale = quantize_folded(x, 4, 8, 1.0)
    assert not operand[1].any()
    assert bool(torch.isfinite(scale).all())
    assert torch.equal(operand[:1], alone[0])
    assert torch.equal(scale[:1], alone[1])


def test_a_zero_group_stays_zero() -> None:
    x = activations(2, 32)
    x[:, 8:16] = 0
    assert not quantize_folded(x, 4, 8, 1.0)[0][:, 8:16].any()


def test_one_huge_token_costs_the_others_nothing() -> None:
    x = activations(4, 32)
    before = quantize_folded(x, 4, 16, 1.0)
    x[2] *= 1e6
    operand, scale = quantize_folded(x, 4, 16, 1.0)
    others = torch.tensor([0, 1, 3])
    assert torch.equal(operand[others], before[0][others])
    assert torch.equal(scale[others], before[1][others])
    assert float((x[2] - operand[2] * scale[2]).abs().max()) <= float(x[2].abs().max()) / 14 * 1.001


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precisions_are_read_exactly(dtype: torch.dtype) -> None:
    x = activations(4, 32).to(dtype)
    for low, high in zip(quantize_folded(x, 4, 8, 0.9), quantize_folded(x.float(), 4, 8, 0.9), strict=True):
        assert torch.equal(low, high)


def smoothed_by_loops(
    x: np.ndarray, group_size: int, scope: str, statistic: str, clip: float, top: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Group scales, token scales and unrounded codes of arXiv 2409.20361, section 3, for ordered ``x``."""
    tokens, channels = x.shape
    size = {"sequence": tokens, "block": 128, "token": 1}[scope]
    sets = math.ceil(tokens / size)
    group_scale = np.zeros((sets, channels // group_size))
    for i in range(tokens):
        rms = math.sqrt((x[i] ** 2).mean()) if statistic == "token_normalized_max" else 1.0
        for g in range(channels // group_size):
            group = x[i, g * group_size : (g + 1) * group_size]
            group_scale[i // size, g] = max(group_scale[i // size, g], np.abs(group).max() / max(rms, 1e-30))
    group_scale = np.maximum(group_scale, 1e-30)
    smoothed = np.zeros_like(x)
    for i in range(tokens):
        for k in range(channels):
            smoothed[i, k] = x[i, k] / group_scale[i // size, k // group_size]
    scale = np.maximum(clip * np.abs(smoothed).max(1) / top, 1e-30)
    return group_scale, scale, smoothed / scale[:, None]


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("statistic", ["max", "token_normalized_max"])
@pytest.mark.parametrize("scope", ["token", "block", "sequence"])
@pytest.mark.parametrize(
    ("tokens", "group_size", "bits", "clip"), [(1, 4, 4, 1.0), (131, 8, 4, 0.9), (5, 24, 8, 1.0)]
)
def test_smoothed_equals_the_loops(
    tokens: int, group_size: int, bits: int, clip: float, scope: str, statistic: str, ordered: bool
) -> None:
    x = activations(tokens, 24, seed=tokens)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1)).int() if ordered else None
    codes, scale, group_scale = quantize_smoothed(x, bits, group_size, scope, statistic, clip, order)
    top = 2 ** (bits - 1) - 1
    exact = x.double().numpy() if order is None else x.double().numpy()[:, order.numpy()]
    expected = smoothed_by_loops(exact, group_size, scope, statistic, clip, top)
    assert group_scale.shape == expected[0].shape
    np.testing.assert_allclose(group_scale.numpy(), expected[0], rtol=2e-6)
    np.testing.assert_allclose(scale.numpy(), expected[1], rtol=2e-6)
    assert_rounded(codes.numpy().astype(float), expected[2], limit=top)


@pytest.mark.parametrize("statistic", ["max", "token_normalized_max"])
@pytest.mark.parametrize("scope", ["token", "block", "sequence"])
def test_smoothing_survives_zeros(scope: str, statistic: str) -> None:
    x = activations(4, 16)
    x[1] = 0
    x[:, 8:12] = 0
    codes, scale, group_scale = quantize_smoothed(x, 4, 4, scope, statistic, 1.0, None)
    assert not codes[1].any()
    assert not codes[:, 8:12].any()
    assert bool(torch.isfinite(scale).all() & torch.isfinite(group_scale).all())
    assert bool((group_scale > 0).all())


def test_the_normalized_statistic_ignores_a_spike_token() -> None:
    """With ``max`` one huge token sets everyone's scale; normalized, a token's size does not matter."""
    x = activations(6, 16)
    spiked = x.clone()
    spiked[3] *= 1e6
    plain = [quantize_smoothed(v, 4, 4, "sequence", "max", 1.0, None)[2] for v in (x, spiked)]
    normalized = [
        quantize_smoothed(v, 4, 4, "sequence", "token_normalized_max", 1.0, None)[2] for v in (x, spiked)
    ]
    assert float((plain[1] / plain[0]).min()) > 100
    torch.testing.assert_close(normalized[1], normalized[0], rtol=1e-5, atol=0)
