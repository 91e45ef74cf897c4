"""Smoothing by itself against loops over groups and tokens in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rrsq.diagnostics.smoothing import smooth
from rrsq.runtime.modules.input import InputScheme

CHANNELS, TOKENS, GROUP = 32, 300, 8
NOISE = torch.randn(TOKENS, CHANNELS, generator=torch.Generator().manual_seed(0))
X = NOISE * torch.logspace(-1, 1, CHANNELS)
INTEGER = InputScheme(CHANNELS, 4, 0.9, group_size=GROUP, scales="integer")
SMOOTHED = replace(INTEGER, scales="real")


def test_integer_scales_are_whole_multiples_of_one_scale_a_token() -> None:
    x = X.double().numpy()
    expected = np.empty_like(x)
    for token in range(TOKENS):
        a = 0.9 * np.abs(x[token]).max() / (18 * 7)
        for start in range(0, CHANNELS, GROUP):
            group = x[token, start : start + GROUP]
            m = np.clip(np.ceil(0.9 * np.abs(group).max() / (7 * a)), 1, 18)
            expected[token, start : start + GROUP] = group / (a * m)
    found = smooth(X, INTEGER, None).numpy()
    # At the edge between two multipliers float32 and float64 may take different ones, a step apart.
    close = np.isclose(found, expected, rtol=1e-4)
    assert close.mean() > 0.995


@pytest.mark.parametrize(("scope", "size"), [("sequence", TOKENS), ("block", 128), ("token", 1)])
@pytest.mark.parametrize("ordered", [False, True])
def test_real_scales_are_the_largest_of_their_groups(scope: str, size: int, ordered: bool) -> None:
    order = X.abs().amax(0).argsort() if ordered else None
    channels = np.arange(CHANNELS) if order is None else order.numpy()
    x = X.double().numpy()
    expected = np.empty_like(x)
    for first in range(0, TOKENS, size):
        tokens = slice(first, first + size)
        for start in range(0, CHANNELS, GROUP):
            group = channels[start : start + GROUP]
            expected[tokens, group] = x[tokens, group] / np.abs(x[tokens, group]).max()
    found = smooth(X, replace(SMOOTHED, scope=scope), order).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("scheme", [InputScheme(CHANNELS, 4), replace(SMOOTHED, bits=16)])
def test_without_smoothing_nothing_changes(scheme: InputScheme) -> None:
    assert torch.equal(smooth(X, scheme, None), X)
