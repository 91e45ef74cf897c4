"""What calibration accumulates, against the sums in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rrsq.quantizer.calibration.hessian import SymmetricSum
from rrsq.quantizer.calibration.statistics import InputStatistics, MeanStatistics


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, n, 12, generator=generator) * 10**n for n in (1, 2, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hessian_and_magnitudes(dtype: torch.dtype) -> None:
    parts = [part.to(dtype) for part in batches()]
    statistics = InputStatistics(12, torch.device("cpu"))
    for part in parts:
        statistics.add(part)
    rows = torch.cat([part.reshape(-1, 12) for part in parts]).double().numpy()
    assert statistics.tokens == 12
    assert statistics.hessian is not None
    np.testing.assert_allclose(
        statistics.hessian.matrix().numpy(), rows.T @ rows, rtol=1e-5, atol=1e-5 * np.abs(rows.T @ rows).max()
    )
    np.testing.assert_array_equal(statistics.absmax.numpy(), np.abs(rows).max(0).astype(np.float32))


@pytest.mark.parametrize("channels", [1, 1500, 2048, 3001])
def test_a_sum_that_is_kept_in_parts(channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(5, channels, generator=generator) for _ in range(2)]
    total = SymmetricSum(channels, torch.device("cpu"))
    for batch in batches:
        total.add(batch)
    rows = torch.cat(batches).double()
    expected = rows.T @ rows
    torch.testing.assert_close(total.matrix().double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(SymmetricSum.of(total.matrix()).matrix(), total.matrix())
    kept = sum(part.numel() for part in total.parts)
    assert kept <= (0.76 if channels >= 2048 else 1) * channels**2


def test_no_hessian_where_none_is_needed() -> None:
    statistics = InputStatistics(12, torch.device("cpu"), with_hessian=False)
    statistics.add(batches()[0])
    assert statistics.hessian is None
    assert float(statistics.absmax.max()) > 0


def test_means_do_not_drift() -> None:
    """A mean far from zero over many batches, which float32 sums would lose."""
    statistics = MeanStatistics()
    generator = torch.Generator().manual_seed(0)
    parts = [1000 + torch.randn(4, 64, 3, generator=generator) for _ in range(50)]
    for part in parts:
        statistics.add(part)
    expected = torch.cat([part.reshape(-1, 3) for part in parts]).double().numpy().mean(0)
    np.testing.assert_allclose(statistics.mean().double().numpy(), expected, rtol=1e-7)
    assert statistics.tokens == 50 * 256


def test_a_mean_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no activations"):
        MeanStatistics().mean()
