"""Rotation, smoothing and quantization kernels against the eager reference and float64."""

from __future__ import annotations

import math

import pytest
import torch

from rrsq import kernels
from rrsq.kernels.eager.hadamard import sylvester

pytest.importorskip("triton")


def activations(tokens, channels, kind, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, channels, generator=generator)
    if kind == "zero_rows":
        x[::2] = 0
    elif kind == "huge_token":
        x[0] *= 1e4
    elif kind == "huge_channel":
        x[:, 3] = 300.0
    return x.to(device, dtype)


def hadamard_12():
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


def both(function, *arguments, **options):
    with kernels.use_kernels("triton"):
        actual = function(*arguments, **options)
    with kernels.use_kernels("eager"):
        return actual, function(*arguments, **options)


def assert_operands_match(actual, eager, code_step):
    """Equal, but for single codes where the value is a tie."""
    difference = (actual.int() - eager.int()).abs()
    assert int(difference.max()) <= code_step
    assert float((difference > 0).float().mean()) < 2e-3


@pytest.mark.parametrize("kind", ["random", "zero_rows", "huge_token", "huge_channel"])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 16), (4, None), (8, None), (4, 128)])
def test_quantize_folded(kind, bits, group_size, device):
    x = activations(5, 384, kind, torch.bfloat16, device)
    (operand, scale), (expected, expected_scale) = both(kernels.quantize_folded, x, bits, group_size, 0.95)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(operand, expected)


@pytest.mark.parametrize("channels", [64, 576, 896, 4864])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_quantize_folded_sizes(channels, dtype, device):
    x = activations(2, channels, "random", dtype, device)
    (operand, scale), (expected, expected_scale) = both(kernels.quantize_folded, x, 4, 32, 1.0)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(operand, expected)


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


@pytest.mark.parametrize(("channels", "name", "block", "inner"), ROTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_hadamard_transform_against_float64(channels, name, block, inner, dtype, device):
    base = hadamard_12() if name == "paley" else torch.ones(1, 1)
    x = activations(3, channels, "huge_channel", dtype, device)
    k = base.shape[0]
    H = torch.kron(base.double(), sylvester(block // k, torch.float64, "cpu")) / math.sqrt(block)
    R = torch.kron(torch.eye(channels // (block * inner)).double(), torch.kron(H, torch.eye(inner).double()))
    expected = x.double().cpu() @ R
    # Of 16-bit activations the kernel keeps 11 bits in between; their own rounding is of 8.
    tolerance = 5e-6 if dtype is torch.float32 else 2.0**-9
    for actual in both(kernels.hadamard_transform, x, base.to(device), block, inner):
        assert actual.dtype is torch.float32
        error = (actual.double().cpu() - expected).abs().amax(1) / expected.abs().amax(1)
        assert float(error.max()) < tolerance


@pytest.mark.parametrize(("channels", "name", "block", "inner"), ROTATIONS)
@pytest.mark.parametrize("kind", ["random", "zero_rows", "huge_channel"])
def test_rotate_and_quantize(channels, name, block, inner, kind, device):
    base = (hadamard_12() if name == "paley" else torch.ones(1, 1)).to(device, torch.int8)
    x = activations(3, channels, kind, torch.bfloat16, device)
    options = {"base": base, "hadamard_block": block, "hadamard_inner": inner}
    for group_size in (32, None):
        (operand, scale), (expected, expected_scale) = both(
            kernels.quantize_folded, x, 4, group_size, 0.9, **options
        )
        assert torch.equal(scale, expected_scale)
        assert torch.equal(operand, expected)


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


def test_quantize_smoothed_after_a_rotation(device):
    x = activations(3, 256, "random", torch.bfloat16, device)
    base = torch.ones(1, 1, device=device)
    actual, expected = both(
        kernels.quantize_smoothed, x, 4, 32, "token", "max", 1.0, base=base, hadamard_block=256
    )
    assert_operands_match(actual[0], expected[0], 1)
