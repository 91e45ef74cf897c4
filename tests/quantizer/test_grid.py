"""The INT4 grid of a weight against exhaustive search in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rrsq.quantizer.grid import WeightGrid, choose_grid, round_to_grid


def weight_of(rows: int, channels: int, seed: int = 0) -> Tensor:
    """Gaussian with a few outliers, and groups of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, channels, generator=generator)
    W *= torch.exp(0.5 * torch.randn(rows, channels // 8, generator=generator)).repeat_interleave(8, 1)
    W[:, 3] *= 4
    return W


def squared_error(W: Tensor, steps: np.ndarray) -> np.ndarray:
    """Squared rounding error of each row in float64."""
    exact = W.double().numpy()
    rounded = np.clip(np.round(exact / steps), -8, 7) * steps
    return ((rounded - exact) ** 2).sum(1)


def steps_of(grid: WeightGrid, channels: int) -> np.ndarray:
    """Scale times multiplier in float64, written out."""
    scale = grid.scale.double().numpy()[:, None]
    if grid.multiplier is None:
        return scale.repeat(channels, 1)
    return scale * grid.multiplier.double().numpy().repeat(channels // grid.multiplier.shape[1], 1)


@pytest.mark.parametrize("group_size", [None, 8, 64])
def test_steps_are_scale_times_multiplier(group_size: int | None) -> None:
    W = weight_of(6, 64)
    grid = choose_grid(W, group_size)
    assert grid.scale.shape == (6,)
    assert (grid.multiplier is None) == (group_size is None)
    np.testing.assert_allclose(grid.steps(64).numpy(), steps_of(grid, 64), rtol=1e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("group_size", [8, 16, 32])
def test_multipliers_are_small_integers_and_use_the_range(group_size: int, seed: int) -> None:
    for search in (True, False):
        multiplier = choose_grid(weight_of(20, 64, seed), group_size, search=search).multiplier
        assert multiplier is not None
        assert multiplier.dtype == torch.uint8
        assert multiplier.shape == (20, 64 // group_size)
        assert int(multiplier.min()) >= 1
        assert int(multiplier.max()) <= 15
        assert int(multiplier.max()) >= 14


@pytest.mark.parametrize("seed", range(3))
def test_signed_multipliers_make_the_largest_magnitude_negative(seed: int) -> None:
    W = weight_of(20, 64, seed)
    plain, signed = (choose_grid(W, 16, signed=each) for each in (False, True))
    assert signed.multiplier is not None
    assert signed.multiplier.dtype == torch.int8
    magnitude = signed.multiplier.abs()
    assert int(magnitude.min()) >= 1
    assert int(magnitude.max()) <= 15
    grouped = W.view(20, 4, 16)
    largest = grouped.gather(2, grouped.abs().argmax(2, keepdim=True)).squeeze(2)
    assert torch.equal(signed.multiplier.sign().float(), -largest.sign())
    errors = [squared_error(W, steps_of(grid, 64)).sum() for grid in (plain, signed)]
    assert errors[1] < 0.97 * errors[0]


def test_without_groups_nothing_is_signed() -> None:
    W = weight_of(6, 64)
    plain, signed = (choose_grid(W, None, signed=each) for each in (False, True))
    assert signed.multiplier is None
    assert torch.equal(plain.scale, signed.scale)


def absmax_error(W: Tensor, levels: float) -> np.ndarray:
    """Squared error of each row with one step of its largest magnitude over ``levels``."""
    step = W.abs().amax(1, keepdim=True).double().numpy() / levels
    return squared_error(W, step.repeat(W.shape[1], 1))


@pytest.mark.parametrize("seed", range(5))
def test_a_searched_step_is_never_worse_than_the_range_as_it_is(seed: int) -> None:
    W = weight_of(40, 64, seed)
    searched = squared_error(W, steps_of(choose_grid(W, None), 64))
    assert (searched <= absmax_error(W, 7.5) * (1 + 1e-6)).all()
    assert searched.sum() < 0.95 * absmax_error(W, 7.5).sum()
    assert searched.sum() < 0.95 * absmax_error(W, 7.0).sum()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("group_size", [8, 16, 32])
def test_searched_groups_are_better_than_the_range_as_it_is(group_size: int, seed: int) -> None:
    """In all; a single row may lose a little, since its scale is fixed before the multipliers are sought."""
    W = weight_of(40, 64, seed)
    searched = squared_error(W, steps_of(choose_grid(W, group_size), 64))
    plain = squared_error(W, steps_of(choose_grid(W, group_size, search=False), 64))
    assert (searched <= 1.15 * plain).all()
    assert (searched <= 1.05 * absmax_error(W, 7.5)).all()
    assert searched.sum() < 0.95 * plain.sum()
    assert searched.sum() < 0.7 * absmax_error(W, 7.5).sum()


def test_without_search_nothing_is_clipped() -> None:
    W = weight_of(10, 64)
    for group_size in (None, 8):
        steps = steps_of(choose_grid(W, group_size, search=False), 64)
        assert (np.abs(W.numpy()) <= 7.5 * steps * (1 + 1e-6)).all()


def test_a_rows_step_is_the_best_of_its_candidates() -> None:
    W = weight_of(12, 16)
    found = squared_error(W, steps_of(choose_grid(W, None), 16))
    best = np.full(12, np.inf)
    for factor in np.arange(1.05, 0.5499, -0.0125):
        steps = (W.abs().amax(1, keepdim=True).double().numpy() / 7.5 * factor).repeat(16, 1)
        best = np.minimum(best, squared_error(W, steps))
    np.testing.assert_allclose(found, best, rtol=1e-4)


@pytest.mark.parametrize("zeros", [False, True])
def test_every_multiplier_is_the_best_of_fifteen(zeros: bool) -> None:
    W = weight_of(60, 24)
    if zeros:
        W[:, ::5] = 0
    grid = choose_grid(W, 8)
    assert grid.multiplier is not None
    for row in range(60):
        for g in range(3):
            group = W[row : row + 1, g * 8 : (g + 1) * 8]
            scale = float(grid.scale[row])
            errors = [squared_error(group, np.full((1, 8), scale * m))[0] for m in range(1, 16)]
            chosen = errors[int(grid.multiplier[row, g]) - 1]
            assert chosen <= min(errors) * (1 + 1e-4)


def test_rows_and_groups_of_zeros_are_harmless() -> None:
    W = weight_of(4, 32)
    W[1] = 0
    W[2, 8:16] = 0
    for group_size in (None, 8):
        for search in (True, False):
            grid = choose_grid(W, group_size, search=search)
            steps = grid.steps(32)
            codes = round_to_grid(W, steps)
            assert bool(torch.isfinite(steps).all() & (steps > 0).all())
            assert not codes[1].any()
            assert not codes[2, 8:16].any()


@pytest.mark.parametrize("search", [True, False])
def test_a_row_does_not_depend_on_the_others(search: bool) -> None:
    W = weight_of(5, 32)
    together, alone = (choose_grid(part, 8, search=search) for part in (W, W[2:3]))
    assert torch.equal(together.scale[2:3], alone.scale)
    assert together.multiplier is not None
    assert alone.multiplier is not None
    assert torch.equal(together.multiplier[2:3], alone.multiplier)


def test_rounding_is_to_the_nearest_code() -> None:
    W = torch.tensor([[-100.0, -8.4, -0.6, -0.4, 0.0, 0.4, 1.6, 7.4, 100.0]])
    assert round_to_grid(W, torch.ones_like(W)).tolist() == [[-8, -8, -1, 0, 0, 0, 2, 7, 7]]
