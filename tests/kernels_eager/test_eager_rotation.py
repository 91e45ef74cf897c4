"""The rotation that is defined to the bit."""

from __future__ import annotations

import pytest
import torch

from rrsq.kernels.eager.hadamard import sylvester
from rrsq.kernels.eager.rotation import LARGEST_FACTOR, rotate_reproducibly, split_rotation
from rrsq.runtime.rotation.hadamard import HadamardPlan, base_matrix, orthonormal, plan_hadamard

SIZES = [8, 12, 64, 576, 1536, 4096, 4864, 8960, 11008, 14336, 18944, 28672]


def activations(tokens: int, channels: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(channels))
    x[0, 3] = 3e4
    x[1] *= 1e-30
    x[2] = 0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("block", "inner"), [(64, 1), (48, 1), (16, 4), (12, 16), (192, 1)])
def test_it_is_the_rotation(block: int, inner: int, dtype: torch.dtype) -> None:
    x = activations(4, 192, dtype)
    plan = HadamardPlan(block, block, 1 if block & (block - 1) == 0 else 12)
    one = torch.kron(orthonormal(plan, torch.float64), torch.eye(inner).double())
    R = torch.block_diag(*[one] * (192 // (block * inner)))
    expected = x.double() @ R
    actual = rotate_reproducibly(x, base_matrix(plan), block, inner).double()
    error = (actual - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-300)
    assert float(error.max()) < 2.0**-11
    assert torch.equal(actual[2], torch.zeros_like(actual[2]))


@pytest.mark.parametrize("channels", SIZES)
def test_sums_are_exact_in_any_order(channels: int) -> None:
    """The same roundings with sums in float64 give the same bits."""
    plan = plan_hadamard(channels)
    x = activations(3, channels, torch.bfloat16)
    base = base_matrix(plan)
    split = split_rotation(channels, plan.base, plan.block, 1)
    assert not split.mix_fast or max(split.fast, split.base * split.dense_power) <= LARGEST_FACTOR

    def rounded(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        exponent = torch.frexp(rows.abs().amax(-1, keepdim=True))[1].clamp_min(-125)
        unit = torch.ldexp(torch.ones_like(exponent).double(), exponent + 8)
        return (rows / unit).half().double(), unit

    mixing = torch.kron(base.double(), sylvester(split.dense_power, torch.float64, "cpu"))
    y, unit = rounded(x.double())
    y = mixing.t() @ y.view(3, -1, mixing.shape[0], split.fast)
    unit = unit.view(3, 1, 1, 1)
    if split.mix_fast:
        y, row_unit = rounded(y)
        y = y @ sylvester(split.fast, torch.float64, "cpu")
        unit = unit * row_unit
    scale = (unit / plan.block**0.5).float()
    expected = (y.float() * scale).reshape(3, channels)
    assert torch.equal(rotate_reproducibly(x, base, plan.block, 1), expected)
