"""Runtime smoothing: the reference against plain loops in float64, the kernel against the reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rrsq import kernels

from .problems import activations, assert_rounded, both, needs_triton, uneven_activations

quantize_smoothed = kernels.quantize_smoothed.reference


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
    x = uneven_activations(tokens, 24, seed=tokens)
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
    x = uneven_activations(4, 16)
    x[1] = 0
    x[:, 8:12] = 0
    codes, scale, group_scale = quantize_smoothed(x, 4, 4, scope, statistic, 1.0, None)
    assert not codes[1].any()
    assert not codes[:, 8:12].any()
    assert bool(torch.isfinite(scale).all() & torch.isfinite(group_scale).all())
    assert bool((group_scale > 0).all())


def test_the_normalized_statistic_ignores_a_spike_token() -> None:
    """With ``max`` one huge token sets everyone's scale; normalized, a token's size does not matter."""
    x = uneven_activations(6, 16)
    spiked = x.clone()
    spiked[3] *= 1e6
    plain = [quantize_smoothed(v, 4, 4, "sequence", "max", 1.0, None)[2] for v in (x, spiked)]
    normalized = [
        quantize_smoothed(v, 4, 4, "sequence", "token_normalized_max", 1.0, None)[2] for v in (x, spiked)
    ]
    assert float((plain[1] / plain[0]).min()) > 100
    torch.testing.assert_close(normalized[1], normalized[0], rtol=1e-5, atol=0)


def assert_operands_match(actual, eager, code_step):
    """Equal, but for single codes where the value is a tie."""
    difference = (actual.int() - eager.int()).abs()
    assert int(difference.max()) <= code_step
    assert float((difference > 0).float().mean()) < 2e-3


@needs_triton
@pytest.mark.parametrize(
    ("scope", "tokens", "statistic", "ordered"),
    [
        ("token", 5, "max", True),
        ("token", 5, "token_normalized_max", False),
        ("block", 130, "max", False),
        ("block", 3, "token_normalized_max", True),
        ("sequence", 7, "max", True),
        ("sequence", 7, "token_normalized_max", False),
    ],
)
def test_quantize_smoothed(scope, tokens, statistic, ordered, device, generator):
    x = activations(tokens, 192, "huge_token", torch.bfloat16, device)
    order = torch.randperm(192, generator=generator).to(device, torch.int32) if ordered else None
    actual, expected = both(kernels.quantize_smoothed, x, 4, 64, scope, statistic, 0.95, order)
    torch.testing.assert_close(actual[2], expected[2], rtol=1e-5, atol=0)
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-5, atol=0)
    assert_operands_match(actual[0], expected[0], 1)


@needs_triton
def test_quantize_smoothed_after_a_rotation(device):
    x = activations(3, 256, "random", torch.bfloat16, device)
    base = torch.ones(1, 1, device=device)
    actual, expected = both(
        kernels.quantize_smoothed, x, 4, 32, "token", "max", 1.0, base=base, hadamard_block=256
    )
    assert_operands_match(actual[0], expected[0], 1)
