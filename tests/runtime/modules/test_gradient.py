"""Gradients through quantized products are those of the float product that they stand for."""

from __future__ import annotations

import pytest
import torch
from test_experts import SCHEMES as EXPERT_SCHEMES
from test_experts import random_experts, routed
from test_fused_linears import IN, INTEGER, ROWS, Attention, activations, fused
from test_quantized_linear import SCHEMES, make_linear
from torch import Tensor

from rrsq.runtime.modules.input import InputScheme
from rrsq.runtime.modules.rotation import OnlineHadamard
from rrsq.runtime.rotation.hadamard import plan_hadamard


def float_input(x: Tensor, rotation: OnlineHadamard | None, order: Tensor | None) -> Tensor:
    """What a linear multiplies, not rounded."""
    x = x if rotation is None else rotation(x)
    return x if order is None else x[..., order.long()]


@pytest.mark.parametrize(("size", "inner"), [(IN, 1), (12, 4)])
def test_of_a_rotation(size: int, inner: int) -> None:
    """That of a product with the rotation's matrix, which it makes of the identity."""
    rotation = OnlineHadamard(plan_hadamard(size), inner)
    matrix = rotation(torch.eye(size * inner)).double()
    x = torch.randn(5, size * inner, generator=torch.Generator().manual_seed(0)).requires_grad_()
    grad = torch.randn(5, size * inner, generator=torch.Generator().manual_seed(1))
    rotation(x).backward(grad)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), grad.double() @ matrix.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rotated", [False, True], ids=["", "rotated"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_of_a_linear(scheme: InputScheme, rotated: bool) -> None:
    linear = make_linear(scheme, rotated=rotated)
    x = activations(2, 3).requires_grad_()
    grad = torch.randn(2, 3, linear.out_features, generator=torch.Generator().manual_seed(1))
    y = linear(x)
    assert torch.equal(y.detach(), linear(x.detach()))
    y.backward(grad)
    exact = activations(2, 3).requires_grad_()
    quantizer = linear.input_quantizer
    operand = float_input(exact, quantizer.rotation, quantizer.channel_order)
    (operand @ linear.dequantized_weight().T).backward(grad)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, exact.grad, rtol=1e-4, atol=1e-4)


def test_of_fused_linears() -> None:
    attention, alone = fused(INTEGER), Attention(INTEGER)
    grad = torch.randn(2, 5, sum(ROWS.values()), generator=torch.Generator().manual_seed(1))
    results = []
    for module in (attention, alone):
        x = activations(2, 5).requires_grad_()
        module(x).backward(grad)
        assert x.grad is not None
        assert x.grad.shape == (2, 5, IN)
        results.append(x.grad)
    assert float(results[0].norm()) > 1.0
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-4)


def test_of_experts() -> None:
    """Against the sum over each token's experts, one by one."""
    experts = random_experts(EXPERT_SCHEMES["A8 a token"])
    x, index, weights = routed(7)
    x.requires_grad_()
    experts(x, index, weights).sum().backward()
    assert x.grad is not None
    total = torch.zeros_like(x.grad)
    for token in range(7):
        for place in range(index.shape[1]):
            alone = x[token : token + 1].detach().requires_grad_()
            one, weight = index[token, place].view(1, 1), weights[token, place].view(1, 1)
            experts(alone, one, weight).sum().backward()
            assert alone.grad is not None
            total[token] += alone.grad[0]
    assert float(total.norm()) > 0.1
    torch.testing.assert_close(x.grad, total, rtol=1e-4, atol=1e-5)


def test_of_experts_against_differences() -> None:
    """Along a direction that many roundings average over, differences of outputs agree with the gradient."""
    experts = random_experts(EXPERT_SCHEMES["A8 a token"])
    x, index, weights = routed(64)
    x.requires_grad_()
    experts(x, index, weights).square().sum().backward()
    assert x.grad is not None
    direction = x.grad / x.grad.norm()
    with torch.no_grad():
        step = 0.05 * float(x.norm())
        above, below = (experts(x + s * step * direction, index, weights).square().sum() for s in (1, -1))
    slope = float((above - below) / (2 * step))
    assert slope == pytest.approx(float(x.grad.norm()), rel=0.1)


def test_nothing_is_recorded_without_need() -> None:
    x = activations(3).requires_grad_()
    with torch.no_grad():
        assert not fused(INTEGER)(x).requires_grad
    assert not fused(INTEGER)(activations(3)).requires_grad
