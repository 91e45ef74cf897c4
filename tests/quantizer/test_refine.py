"""Descent behind GPTQ, against errors and optima in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from rrsq.quantizer.grid import WeightGrid, choose_grid
from rrsq.quantizer.refine import refine
from rrsq.quantizer.weights import quantize_weight
from rrsq.recipe import Weights

DAMPING = 0.01


def weight_of(rows: int, channels: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed))


def hessian_of(channels: int, seed: int = 0) -> Tensor:
    """``Σ x xᵀ`` of strongly correlated inputs of uneven size."""
    generator = torch.Generator().manual_seed(100 + seed)
    x = torch.randn(512, channels, generator=generator) @ torch.randn(channels, channels, generator=generator)
    x *= torch.exp(torch.randn(channels, generator=generator))
    return x.T @ x


def row_errors(W: Tensor, values: Tensor, hessian: Tensor) -> np.ndarray:
    """``(w - q) H (w - q)ᵀ`` of each row, with the damped Hessian, in float64."""
    H = hessian.double().numpy()
    H = H + DAMPING * H.diagonal().mean() * np.eye(len(H))
    difference = W.double().numpy() - values.double().numpy()
    return np.einsum("nk,kl,nl->n", difference, H, difference)


def quantized(W: Tensor, hessian: Tensor, passes: int, **options: object) -> Tensor:
    recipe = Weights.model_validate({"refinement": passes, "damping": DAMPING, **options})
    return quantize_weight(W, recipe, hessian).values()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("group_size", [None, 8])
def test_no_row_gets_worse_and_the_whole_gets_better(group_size: int | None, signed: bool, seed: int) -> None:
    W, H = weight_of(16, 48, seed), hessian_of(48, seed)
    errors = [
        row_errors(W, quantized(W, H, passes, group_size=group_size, signed=signed), H)
        for passes in (0, 1, 2, 4)
    ]
    for earlier, later in itertools.pairwise(errors):
        assert (later <= earlier * (1 + 1e-4)).all()
    assert errors[1].sum() < 0.98 * errors[0].sum()


def test_from_nearest_codes_it_gains_as_much_as_gptq() -> None:
    """A start that knows nothing of the Hessian ends where one pass behind GPTQ does, within a fifth."""
    W, H = weight_of(16, 64), hessian_of(64)
    grid = choose_grid(W, 16)
    nearest = (W / grid.steps(64)).round().clamp(-8, 7).to(torch.int8)
    codes, found = refine(W, nearest, grid, H, damping=DAMPING, passes=8)
    gptq = row_errors(W, quantized(W, H, 0, group_size=16), H).sum()
    assert row_errors(W, nearest * grid.steps(64), H).sum() > 1.5 * gptq
    assert row_errors(W, codes * found.steps(64), H).sum() < 1.2 * gptq


def test_nothing_is_left_to_gain_by_a_scale_or_a_single_code() -> None:
    W, H = weight_of(4, 24), hessian_of(24)
    grid = choose_grid(W, 8, signed=True)
    start = (W / grid.steps(24)).round().clamp(-8, 7).to(torch.int8)
    codes, found = refine(W, start, grid, H, damping=DAMPING, passes=60)
    best = row_errors(W, codes * found.steps(24), H)
    for factor in (0.99, 1.01):
        assert (row_errors(W, factor * codes * found.steps(24), H) > best).all()
    for channel in range(24):
        for change in (-1, 1):
            other = codes.clone()
            other[:, channel] = (other[:, channel] + change).clamp(-8, 7)
            assert (row_errors(W, other * found.steps(24), H) >= best * (1 - 2e-4)).all()


@pytest.mark.parametrize("signed", [False, True])
def test_the_grid_keeps_its_form(signed: bool) -> None:
    W, H = weight_of(16, 48), hessian_of(48)
    result = quantize_weight(W, Weights(group_size=8, signed=signed, refinement=2), H)
    assert result.codes.dtype == torch.int8
    assert int(result.codes.min()) >= -8
    assert int(result.codes.max()) <= 7
    assert result.scale.dtype == torch.float32
    assert bool((result.scale > 0).all())
    assert result.multiplier is not None
    assert result.multiplier.dtype == (torch.int8 if signed else torch.uint8)
    assert int(result.multiplier.abs().min()) >= 1
    assert int(result.multiplier.abs().max()) <= 15


def test_rows_do_not_depend_on_each_other_and_it_repeats_itself() -> None:
    W, H = weight_of(24, 48), hessian_of(48)
    grid = choose_grid(W, 8)
    start = (W / grid.steps(48)).round().clamp(-8, 7).to(torch.int8)
    whole = refine(W, start, grid, H, damping=DAMPING, passes=2)
    again = refine(W, start, grid, H, damping=DAMPING, passes=2)
    assert torch.equal(whole[0], again[0])
    assert torch.equal(whole[1].scale, again[1].scale)
    assert grid.multiplier is not None
    half = WeightGrid(grid.scale[:12], grid.multiplier[:12])
    part = refine(W[:12], start[:12], half, H, damping=DAMPING, passes=2)
    np.testing.assert_allclose(
        row_errors(W[:12], part[0] * part[1].steps(48), H),
        row_errors(W, whole[0] * whole[1].steps(48), H)[:12],
        rtol=0.05,
    )


@pytest.mark.parametrize("hessian", [torch.zeros(16, 16), torch.full((16, 16), torch.nan)])
def test_without_a_hessian_everything_stays(hessian: Tensor) -> None:
    W = weight_of(4, 16)
    grid = choose_grid(W, 8)
    codes = (W / grid.steps(16)).round().clamp(-8, 7).to(torch.int8)
    found, same = refine(W, codes, grid, hessian, damping=DAMPING, passes=2)
    assert torch.equal(found, codes)
    assert same is grid


def test_rows_of_zeros_and_dead_channels() -> None:
    W, H = weight_of(8, 32), hessian_of(32)
    W[3] = 0
    H[5] = H[:, 5] = 0
    values = quantized(W, H, 2, group_size=8, signed=True)
    assert bool(torch.isfinite(values).all())
    assert not bool(values[3].any())
