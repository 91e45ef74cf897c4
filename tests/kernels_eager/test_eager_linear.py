"""The quantized products against float64 products of the dequantized operands."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rrsq.kernels.eager.linear import int8_matmul, linear_folded, linear_group_scaled, linear_weight_only
from rrsq.kernels.packing import pack_int4

OUT = 20


class Weight:
    """Random codes, scales and (with groups of 16) multipliers, with the float64 matrix they stand for."""

    def __init__(self, in_features: int, grouped: bool, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(-8, 8, (OUT, in_features), generator=generator)
        self.packed = pack_int4(codes)
        self.scale = torch.rand(OUT, generator=generator) + 0.01
        self.multiplier: Tensor | None = None
        factor = np.ones((OUT, in_features))
        if grouped:
            self.multiplier = torch.randint(1, 16, (OUT, in_features // 16), generator=generator).byte()
            factor = self.multiplier.double().numpy().repeat(16, 1)
        self.operand = torch.from_numpy(codes.numpy() * factor).to(torch.int8)
        self.dense = codes.double().numpy() * factor * self.scale.double().numpy()[:, None]


def random_bias(has_bias: bool) -> Tensor | None:
    return torch.randn(OUT, generator=torch.Generator().manual_seed(9)) if has_bias else None


def assert_close(y: Tensor, expected: np.ndarray, tolerance: float = 1e-6) -> None:
    assert np.abs(y.double().numpy() - expected).max() <= tolerance * np.abs(expected).max()


def added(expected: np.ndarray, bias: Tensor | None) -> np.ndarray:
    return expected if bias is None else expected + bias.double().numpy()


@pytest.mark.parametrize(("m", "k", "n"), [(1, 2, 1), (1, 96, 7), (5, 576, 3), (33, 64, 65)])
def test_int8_matmul_is_exact(m: int, k: int, n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-128, 128, (m, k), generator=generator).to(torch.int8)
    b = torch.randint(-128, 128, (n, k), generator=generator).to(torch.int8)
    product = int8_matmul(a, b)
    assert product.dtype == torch.int32
    assert torch.equal(product.long(), a.long() @ b.long().T)


def test_the_largest_accumulation_is_exact() -> None:
    a = torch.full((2, 28672), -126, dtype=torch.int8)
    b = torch.full((3, 28672), -120, dtype=torch.int8)
    assert (int8_matmul(a, b) == 126 * 120 * 28672).all()


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("tokens", [1, 9])
def test_folded(tokens: int, grouped: bool, has_bias: bool) -> None:
    weight, bias = Weight(96, grouped), random_bias(has_bias)
    generator = torch.Generator().manual_seed(1)
    operand = torch.randint(-126, 127, (tokens, 96), generator=generator).to(torch.int8)
    scale = torch.rand(tokens, generator=generator)
    y = linear_folded(operand, scale, weight.operand, weight.scale, bias, torch.float32)
    dense = operand.double().numpy() * scale.double().numpy()[:, None]
    assert_close(y, added(dense @ weight.dense.T, bias))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("tokens", "per_set"), [(1, 1), (9, 1), (9, 9), (9, 4), (131, 128)])
def test_group_scaled(tokens: int, per_set: int, grouped: bool, has_bias: bool) -> None:
    weight, bias = Weight(96, grouped), random_bias(has_bias)
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-7, 8, (tokens, 96), generator=generator).to(torch.int8)
    scale = torch.rand(tokens, generator=generator)
    group_scale = torch.rand(-(-tokens // per_set), 4, generator=generator) + 0.1
    y = linear_group_scaled(
        codes, scale, group_scale, per_set, weight.operand, weight.scale, bias, torch.float32
    )
    dense = codes.double().numpy() * scale.double().numpy()[:, None]
    for i in range(tokens):
        dense[i] *= group_scale[i // per_set].double().numpy().repeat(24)
    assert_close(y, added(dense @ weight.dense.T, bias))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float64, 1e-7)]
)
def test_weight_only(dtype: torch.dtype, tolerance: float, grouped: bool, has_bias: bool) -> None:
    weight, bias = Weight(96, grouped), random_bias(has_bias)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = linear_weight_only(x, weight.packed, weight.multiplier, weight.scale, bias)
    assert y.dtype == dtype
    assert_close(y, added(x.double().numpy() @ weight.dense.T, bias), tolerance)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_result_has_the_dtype_asked_for(out_dtype: torch.dtype) -> None:
    weight = Weight(96, True)
    operand = torch.ones(2, 96, dtype=torch.int8)
    bias = random_bias(True)
    y = linear_folded(operand, torch.full((2,), 0.01), weight.operand, weight.scale, bias, out_dtype)
    full = linear_folded(operand, torch.full((2,), 0.01), weight.operand, weight.scale, bias, torch.float32)
    assert y.dtype == out_dtype
    assert torch.equal(y, full.to(out_dtype))
