"""Storage of keys and values: error bounds, number of levels and bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rrsq.kernels import decode_cache, encode_cache


@given(
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([2, 8, 16]),
    zero_point=st.booleans(),
    seed=st.integers(0, 2**31),
)
@example(bits=4, group_size=2, zero_point=True, seed=143336)
@settings(max_examples=80, deadline=None)
def test_error_is_at_most_half_a_step_of_the_group(
    bits: int, group_size: int, zero_point: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 2, 16, generator=generator) * torch.exp(3 * torch.randn(3, 2, 1, generator=generator))
    x = x.clamp(-3e4, 3e4)  # Scale and minimum are float16: beyond it there is no bound.
    codes, scale, minimum = encode_cache(x, bits, group_size, zero_point)
    assert codes.shape == (3, 2, 16 * bits // 8)
    assert codes.dtype == torch.uint8
    assert scale.shape == (3, 2, 16 // group_size)
    assert scale.dtype == torch.float16
    assert (minimum is not None) == zero_point
    decoded = decode_cache(codes, scale, minimum, bits).double().numpy()
    exact = x.double().numpy().reshape(3, 2, -1, group_size)
    error = np.abs(decoded.reshape(exact.shape) - exact)
    if zero_point:
        step = (exact.max(-1) - exact.min(-1)) / (2**bits - 1)
    else:
        step = np.abs(exact).max(-1) / (2 ** (bits - 1) - 0.5)
    # Scale and minimum are rounded to float16: 2^-11 of them, or half of its smallest number, 2^-25.
    rounding = 2 * 2.0**-11 * np.abs(exact).max(-1) + 2**bits * 2.0**-25
    assert (error.max(-1) <= step / 2 + rounding).all()


def test_symmetric_codes_by_loops() -> None:
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    codes, scale, _ = encode_cache(x, 4, 4, False)
    for row in range(2):
        for j in range(8):
            step = float(scale[row, j // 4])
            byte = int(codes[row, j % 4])
            nibble = byte & 15 if j < 4 else byte >> 4
            assert nibble == min(max(round(float(x[row, j]) / step), -7), 7) + 8


@pytest.mark.parametrize("bits", [4, 8])
def test_signed_codes_by_loops(bits: int) -> None:
    """The largest magnitude of a group is the lowest code, whichever its sign; every code serves."""
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    codes, scale, minimum = encode_cache(x, bits, 4, False, signed=True)
    assert minimum is None
    decoded, lowest = decode_cache(codes, scale, None, bits), 2 ** (bits - 1)
    for row in range(64):
        for group in range(2):
            numbers = x[row, 4 * group : 4 * group + 4].double().numpy()
            largest = numbers[np.abs(numbers).argmax()]
            step = float(np.float16(-largest / lowest))
            assert float(scale[row, group]) == step
            expected = np.clip(np.round(numbers / step), -lowest, lowest - 1)
            assert expected.min() == -lowest
            np.testing.assert_allclose(decoded[row, 4 * group : 4 * group + 4], expected * step, rtol=1e-6)


def test_signed_codes_lose_less_than_symmetric_ones() -> None:
    """Gaussian numbers in groups of 32: 21.3 and 20.5 dB."""
    x = torch.randn(4096, 32, generator=torch.Generator().manual_seed(0))
    errors = [
        float((decode_cache(*encode_cache(x, 4, 32, False, signed), 4) - x).square().mean())
        for signed in (False, True)
    ]
    assert errors[1] < 0.87 * errors[0]


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0, 1e6])
def test_signed_constant_groups(value: float) -> None:
    x = torch.full((1, 1, 8), value)
    decoded = decode_cache(*encode_cache(x, 4, 8, False, signed=True), 4)
    torch.testing.assert_close(decoded, x.clamp(max=8 * 65504.0), rtol=1e-3, atol=1e-6)


def test_asymmetric_codes_by_loops() -> None:
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)) + 3
    codes, scale, minimum = encode_cache(x, 4, 4, True)
    assert minimum is not None
    for row in range(2):
        for j in range(8):
            step, low = float(scale[row, j // 4]), float(minimum[row, j // 4])
            byte = int(codes[row, j % 4])
            nibble = byte & 15 if j < 4 else byte >> 4
            assert nibble == min(max(round((float(x[row, j]) - low) / step), 0), 15)


@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("value", [0.0, 5.0, -3.0])
def test_constant_groups(value: float, zero_point: bool) -> None:
    x = torch.full((1, 1, 8), value)
    decoded = decode_cache(*encode_cache(x, 4, 8, zero_point), 4)
    assert float((decoded - x).abs().max()) <= abs(value) / 14
    if zero_point or value == 0:
        torch.testing.assert_close(decoded, x)


@pytest.mark.parametrize("zero_point", [False, True])
def test_values_beyond_float16_stay_finite(zero_point: bool) -> None:
    x = torch.tensor([[1e6, -1e6, 3.0, 0.0]])
    assert bool(torch.isfinite(decode_cache(*encode_cache(x, 4, 4, zero_point), 4)).all())


@pytest.mark.parametrize("zero_point", [False, True])
def test_one_group_does_not_touch_another(zero_point: bool) -> None:
    x = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    before = decode_cache(*encode_cache(x, 4, 8, zero_point), 4)
    x[:, 8:] *= 1000
    after = decode_cache(*encode_cache(x, 4, 8, zero_point), 4)
    assert torch.equal(before[:, :8], after[:, :8])
