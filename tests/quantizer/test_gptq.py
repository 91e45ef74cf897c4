"""GPTQ against a slow textbook version in float64, and against rounding to nearest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rrsq.quantizer.gptq import factor_hessian, gptq_codes
from rrsq.quantizer.grid import choose_grid, round_to_grid
from rrsq.quantizer.weights import quantize_weight
from rrsq.recipe import Weights


def weight_of(rows: int, channels: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed))


def hessian_of(channels: int, seed: int = 0, tokens: int = 512) -> Tensor:
    """``Σ x xᵀ`` of strongly correlated inputs of uneven size."""
    generator = torch.Generator().manual_seed(100 + seed)
    mixing = torch.randn(channels, channels, generator=generator)
    x = torch.randn(tokens, channels, generator=generator) @ mixing
    x *= torch.exp(torch.randn(channels, generator=generator))
    return x.T @ x


def hessian_error(W: Tensor, codes: Tensor, steps: Tensor, hessian: Tensor) -> float:
    """``tr((W - Q) H (W - Q)ᵀ)`` in float64."""
    difference = (W.double() - codes.double() * steps.double()).numpy()
    return float(np.einsum("nk,kl,nl->", difference, hessian.double().numpy(), difference))


def textbook(W: Tensor, steps: Tensor, hessian: Tensor, damping: float, act_order: bool) -> np.ndarray:
    """Optimal brain quantization, one channel after the other, each time with the explicit inverse of what is
    left of the Hessian (arXiv 2208.11580, equation 3; the fixed order is GPTQ's)."""
    exact, H = W.double().numpy().copy(), hessian.double().numpy().copy()
    grid = steps.double().numpy()
    H += damping * H.diagonal().mean() * np.eye(len(H))
    left = list(range(len(H)))
    if act_order:
        left.sort(key=lambda k: -hessian.diagonal()[k].item())
    codes = np.zeros_like(exact)
    while left:
        k, rest = left[0], left[1:]
        inverse = np.linalg.inv(H[np.ix_(left, left)])
        codes[:, k] = np.clip(np.round(exact[:, k] / grid[:, k]), -8, 7)
        error = (exact[:, k] - codes[:, k] * grid[:, k]) / inverse[0, 0]
        exact[:, rest] -= np.outer(error, inverse[0, 1:])
        left = rest
    return codes


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [None, 4])
def test_it_equals_the_textbook(group_size: int | None, act_order: bool, seed: int) -> None:
    W, H = weight_of(6, 24, seed), hessian_of(24, seed)
    grid = choose_grid(W, group_size)
    steps = grid.steps(24)
    factor = factor_hessian(H, act_order=act_order, damping=0.01)
    result = gptq_codes(W, grid, factor)
    assert result.used_gptq
    assert result.codes.dtype == torch.int8
    assert (result.codes.numpy() == textbook(W, steps, H, 0.01, act_order)).all()


@pytest.mark.parametrize("act_order", [False, True])
def test_lazy_updates_across_blocks_equal_the_textbook(act_order: bool) -> None:
    """300 channels are three blocks of at most 128; a tie that rounds otherwise may change a few codes."""
    W, H = weight_of(2, 300), hessian_of(300, tokens=900)
    grid = choose_grid(W, None)
    steps = grid.steps(300)
    codes = gptq_codes(W, grid, factor_hessian(H, act_order=act_order, damping=0.01)).codes
    expected = torch.from_numpy(textbook(W, steps, H, 0.01, act_order))
    assert float((codes != expected).double().mean()) < 0.02
    reference = hessian_error(W, expected, steps, H)
    assert hessian_error(W, codes, steps, H) == pytest.approx(reference, rel=0.02)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("channels", "group_size"), [(32, None), (96, 32), (200, None), (200, 8)])
def test_it_is_never_worse_than_rounding(
    channels: int, group_size: int | None, act_order: bool, seed: int
) -> None:
    W, H = weight_of(16, channels, seed), hessian_of(channels, seed)
    grid = choose_grid(W, group_size)
    steps = grid.steps(channels)
    codes = gptq_codes(W, grid, factor_hessian(H, act_order=act_order, damping=0.01)).codes
    assert int(codes.min()) >= -8
    assert int(codes.max()) <= 7
    assert hessian_error(W, codes, steps, H) < 0.9 * hessian_error(W, round_to_grid(W, steps), steps, H)


def test_act_order_visits_channels_by_falling_diagonal() -> None:
    H = hessian_of(40)
    factor = factor_hessian(H, act_order=True, damping=0.01)
    assert factor is not None
    assert factor.order.tolist() == np.argsort(-H.diagonal().numpy(), kind="stable").tolist()


@pytest.mark.parametrize("act_order", [False, True])
def test_the_factor_is_the_cholesky_factor_of_the_inverse(act_order: bool) -> None:
    H = hessian_of(20)
    factor = factor_hessian(H, act_order=act_order, damping=0.05)
    assert factor is not None
    order = factor.order.numpy()
    damped = H.double().numpy() + 0.05 * H.double().diagonal().mean().item() * np.eye(20)
    upper = factor.upper.double().numpy()
    assert (np.tril(upper, -1) == 0).all()
    inverse = np.linalg.inv(damped[np.ix_(order, order)])
    np.testing.assert_allclose(upper.T @ upper, inverse, rtol=1e-3, atol=1e-4 * np.abs(inverse).max())


@pytest.mark.parametrize("act_order", [False, True])
def test_a_diagonal_hessian_means_rounding_to_nearest(act_order: bool) -> None:
    W = weight_of(7, 150)
    grid = choose_grid(W, None)
    steps = grid.steps(150)
    H = torch.diag(torch.rand(150, generator=torch.Generator().manual_seed(0)) + 0.1)
    result = gptq_codes(W, grid, factor_hessian(H, act_order=act_order, damping=0.01))
    assert result.used_gptq
    assert torch.equal(result.codes, round_to_grid(W, steps))


@pytest.mark.parametrize("act_order", [False, True])
def test_dead_channels_get_zeros_and_disturb_nothing(act_order: bool) -> None:
    W, H = weight_of(5, 32), hessian_of(32)
    dead = torch.tensor([0, 7, 31])
    H[dead] = 0
    H[:, dead] = 0
    grid = choose_grid(W, None)
    steps = grid.steps(32)
    factor = factor_hessian(H, act_order=act_order, damping=1e-4)
    assert factor is not None
    assert factor.dead.nonzero().flatten().tolist() == dead.tolist()
    codes = gptq_codes(W, grid, factor).codes
    assert not codes[:, dead].any()
    alive = torch.tensor([k for k in range(32) if k not in dead.tolist()])
    # The dead diagonal of one enters the mean that damping is relative to, hence the explicit number.
    mean = (H.diagonal().sum() + 3) / 32 / H[alive][:, alive].diagonal().mean()
    expected = textbook(
        W[:, alive], steps[:, alive], H[alive][:, alive], 1e-4 * float(mean), act_order=act_order
    )
    assert (codes[:, alive].numpy() == expected).all()


def test_a_singular_hessian_gets_more_damping() -> None:
    """Eight directions in 64 channels: positive semidefinite, and not definite to float32 without help."""
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    H = x.T @ x
    factor = factor_hessian(H, act_order=False, damping=1e-9)
    if factor is None:
        factor = factor_hessian(H, act_order=False, damping=1e-8)
    assert factor is not None
    assert factor.damping > 1e-8
    W = weight_of(4, 64)
    grid = choose_grid(W, None)
    steps = grid.steps(64)
    codes = gptq_codes(W, grid, factor).codes
    assert hessian_error(W, codes, steps, H) < hessian_error(W, round_to_grid(W, steps), steps, H)


def test_an_indefinite_hessian_cannot_be_factored() -> None:
    H = torch.eye(8)
    H[0, 1] = H[1, 0] = 50.0
    assert factor_hessian(H, act_order=True, damping=1e-4) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("position", [(3, 3), (2, 5)], ids=["diagonal", "off the diagonal"])
def test_a_hessian_that_is_not_finite_falls_back(position: tuple[int, int], value: float) -> None:
    H = hessian_of(16)
    H[position] = H[position[::-1]] = value
    assert factor_hessian(H, act_order=False, damping=0.01) is None
    W = weight_of(4, 16)
    result = quantize_weight(W, Weights(method="gptq", group_size=4), H)
    assert result.fell_back
    assert result.damping == 0.0
    expected = quantize_weight(W, Weights(method="rtn", group_size=4), None)
    assert not expected.fell_back
    assert torch.equal(result.codes, expected.codes)
    assert torch.equal(result.scale, expected.scale)


def test_without_a_factor_it_rounds() -> None:
    W = weight_of(4, 16)
    grid = choose_grid(W, None)
    steps = grid.steps(16)
    result = gptq_codes(W, grid, None)
    assert not result.used_gptq
    assert torch.equal(result.codes, round_to_grid(W, steps))


def test_errors_that_are_not_finite_fall_back() -> None:
    """A factor may be finite, and what it is divided by too small."""
    W = weight_of(4, 16)
    grid = choose_grid(W, None)
    factor = factor_hessian(hessian_of(16), act_order=False, damping=0.01)
    assert factor is not None
    factor.upper[3, 3] = 0.0
    result = gptq_codes(W, grid, factor)
    assert not result.used_gptq
    assert torch.equal(result.codes, round_to_grid(W, grid.steps(16)))


def test_neither_weight_nor_hessian_is_written_to() -> None:
    W, H = weight_of(4, 150), hessian_of(150)
    W_before, H_before = W.clone(), H.clone()
    quantize_weight(W, Weights(), H)
    assert torch.equal(W, W_before)
    assert torch.equal(H, H_before)


def test_stacked_linears_get_what_they_would_get_alone() -> None:
    W, H = weight_of(10, 64), hessian_of(64)
    recipe = Weights(group_size=16)
    together, alone = quantize_weight(W, recipe, H), quantize_weight(W[4:], recipe, H)
    assert torch.equal(together.scale[4:], alone.scale)
    assert float((together.codes[4:] != alone.codes).double().mean()) < 0.01
