"""Signed levels: the reference against plain loops in float64, the kernel against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rrsq import kernels
from rrsq.kernels.quantize_signed import rotate_blocks
from rrsq.kernels.rotation import sylvester

from .problems import both, needs_triton, uneven_activations

quantize_signed = kernels.quantize_signed.reference
GPU = "cuda" if torch.cuda.is_available() else "cpu"


def least_error(group: np.ndarray, scale: float) -> float:
    """The least squared error of the three candidates of one rotated group."""
    largest = group[np.abs(group).argmax()]
    sign = -1.0 if largest > 0 else 1.0
    r = sign * group / scale
    middle = next(m for m in range(1, 16) if m == 15 or (-8.49 * m <= r.min() and r.max() <= 7.49 * m))
    errors = []
    for m in {min(max(middle + step, 1), 15) for step in (-1, 0, 1)}:
        code = np.clip(np.round(r / m), -8, 7)
        errors.append(float(((r - m * code) ** 2).sum()) * scale**2)
    return min(errors)


@pytest.mark.parametrize(
    ("channels", "group_size", "block"), [(64, 16, 16), (48, 16, 1), (24, 8, 8), (60, 4, 4)]
)
def test_the_least_error_of_the_candidates_is_taken(channels: int, group_size: int, block: int) -> None:
    x = uneven_activations(9, channels, seed=channels)
    operand, scale = quantize_signed(x, 4, group_size, block)
    y = rotate_blocks(x, block).double().numpy()
    np.testing.assert_allclose(scale.double().numpy(), np.abs(y).max(1) / 105, rtol=1e-6)
    assert int(operand.abs().max()) <= 120
    for i in range(9):
        for g in range(channels // group_size):
            group = slice(g * group_size, (g + 1) * group_size)
            a = float(scale[i])
            error = float(((y[i, group] - operand[i, group].double().numpy() * a) ** 2).sum())
            # float16 has 11 bits.
            assert error <= least_error(y[i, group], a) * (1 + 2**-6) + 1e-12


def test_operands_are_signed_multiples_of_sixteen_levels() -> None:
    operand, _ = quantize_signed(uneven_activations(40, 128, seed=1), 4, 16, 16)
    for group in operand.view(-1, 16).tolist():
        fits = [
            (m, s)
            for m in range(1, 16)
            for s in (1, -1)
            if all(v % m == 0 and -8 <= s * v // m <= 7 for v in group)
        ]
        assert fits
    # The level without a counterpart is used.
    assert any(v % 8 == 0 and max(map(abs, g)) == abs(v) for g in operand.view(-1, 16).tolist() for v in g)


def test_the_rotation_is_orthonormal_and_stays_in_its_blocks() -> None:
    x = uneven_activations(7, 96, seed=3)
    exact = x.double().view(7, 6, 16) @ sylvester(16, torch.float64, "cpu") / 4
    y = rotate_blocks(x, 16).double().view(7, 6, 16)
    assert float((y - exact).abs().max() / exact.abs().amax()) < 2**-12
    changed = x.clone()
    changed[:, 20] += 5.0
    moved = (rotate_blocks(changed, 16) != rotate_blocks(x, 16)).view(7, 6, 16).any(2)
    assert moved[:, 1].all()
    assert not moved[:, [0, 2, 3, 4, 5]].any()


def test_gaussian_data_is_quantized_to_the_expected_snr() -> None:
    """22.4 dB with groups of 16, where fifteen unsigned levels give 21.4 (Monte Carlo, other data)."""
    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    operand, scale = quantize_signed(x, 4, 16, 1)
    noise = (operand.double() * scale.double().unsqueeze(1) - x.double()).square().sum()
    snr = float(10 * torch.log10(x.double().square().sum() / noise))
    assert 22.3 < snr < 22.55
    unsigned, step = kernels.quantize_tokens.reference(x, 4, 16, 0.9333)
    noise = (unsigned.double() * step.double().unsqueeze(1) - x.double()).square().sum()
    assert snr > float(10 * torch.log10(x.double().square().sum() / noise)) + 0.9


def test_eight_bits() -> None:
    x = uneven_activations(9, 64, seed=5)
    operand, scale = quantize_signed(x, 8, None, 16)
    y = rotate_blocks(x, 16)
    np.testing.assert_allclose(scale.numpy(), y.abs().amax(1).numpy() / 127, rtol=1e-6)
    error = (operand.float() * scale.unsqueeze(1) - y).abs()
    assert (error <= scale.unsqueeze(1) * 0.5001).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("group_size", [16, None])
def test_what_is_not_finite_makes_the_scale_nan(value: float, group_size: int | None) -> None:
    x = uneven_activations(3, 32, seed=5)
    x[1, 7] = value
    _, scale = quantize_signed(x, 4, group_size, 16)
    assert scale.isnan().tolist() == [False, True, False]


def test_zeros_stay_zeros() -> None:
    operand, scale = quantize_signed(torch.zeros(2, 32), 4, 16, 16)
    assert not operand.any()
    assert (scale > 0).all()


def on_device(x: Tensor) -> Tensor:
    return x.to(GPU)


@needs_triton
@pytest.mark.parametrize(
    ("channels", "bits", "group_size", "block", "dtype"),
    [
        (64, 4, 16, 16, torch.float32),
        (64, 4, 16, 16, torch.float16),
        (576, 4, 16, 16, torch.bfloat16),
        (192, 4, 32, 16, torch.bfloat16),
        (96, 8, None, 16, torch.bfloat16),
        (128, 4, 16, 32, torch.float32),
        (80, 4, None, 16, torch.float16),
        (96, 4, 16, 1, torch.bfloat16),
        (48, 4, 4, 8, torch.bfloat16),
        (20, 4, 4, 4, torch.bfloat16),
        (64, 8, None, 1, torch.float32),
        (128, 8, None, 64, torch.bfloat16),
    ],
)
def test_the_kernel_has_the_reference_s_bits(
    channels: int, bits: int, group_size: int | None, block: int, dtype: torch.dtype
) -> None:
    x = on_device(uneven_activations(5, channels, seed=channels).to(dtype))
    x[2] = 0
    x[3, 5] = torch.nan
    reference, kernel = both(kernels.quantize_signed, x, bits, group_size, block)
    finite = [0, 1, 2, 4]
    assert torch.equal(kernel[0][finite], reference[0][finite])
    assert torch.equal(kernel[1][finite], reference[1][finite])
    assert bool(kernel[1][3].isnan())
