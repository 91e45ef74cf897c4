"""RMSNorm: the reference against float64, the kernel against the reference."""

from __future__ import annotations

import pytest
import torch

from rrsq import kernels
from rrsq.errors import KernelUnavailableError

from .problems import both, needs_triton


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(shape, generator=generator) * torch.randn(shape[:-1], generator=generator)[..., None]
    ).to(dtype)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("late", [False, True])
def test_reference_against_float64(offset: float, late: bool) -> None:
    x, weight = tokens(5, 96), tokens(1, 96)[0]
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (offset + weight.double())
    torch.testing.assert_close(
        kernels.rms_norm.reference(x, weight, 1e-5, offset, late).double(), expected, rtol=1e-5, atol=1e-6
    )


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("shape", [(5, 96), (2, 3, 64), (1, 1, 1536), (2, 4, 3, 16), (0, 32)])
def test_kernel_gives_what_the_reference_gives(
    shape: tuple[int, ...], late: bool, dtype: torch.dtype, device: torch.device
) -> None:
    x, weight = tokens(*shape, dtype=dtype).to(device), tokens(1, shape[-1], dtype=dtype)[0].to(device)
    actual, expected = both(kernels.rms_norm, x, weight, 1e-6, float(late), late)
    assert actual.shape == x.shape
    assert actual.dtype == dtype
    # The interpreter cuts off what does not fit into bfloat16.
    unit = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-6}[dtype]
    torch.testing.assert_close(actual, expected, rtol=unit, atol=unit)


@needs_triton
def test_rows_that_are_not_contiguous(device: torch.device) -> None:
    x = tokens(4, 6, 32).to(device).transpose(0, 1)
    actual, expected = both(kernels.rms_norm, x, tokens(1, 32)[0].to(device), 1e-6, 0.0, False)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@needs_triton
def test_rows_of_a_wider_matrix(device: torch.device) -> None:
    x, weight = tokens(4, 96).to(device)[:, 16:80], tokens(1, 64)[0].to(device)
    actual, expected = both(kernels.rms_norm, x, weight, 1e-6, 0.0, False)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@needs_triton
@pytest.mark.parametrize("late", [False, True])
def test_it_is_rounded_where_the_reference_rounds(late: bool, device: torch.device) -> None:
    """Once behind the gain, or before it too; hardly any number depends on the order of the sum."""
    x, weight = (tokens(rows, 96, dtype=torch.float16).to(device) for rows in (20, 1))
    actual, expected = both(kernels.rms_norm, x, weight[0], 1e-6, 0.0, late)
    other = kernels.rms_norm.reference(x, weight[0], 1e-6, 0.0, not late)
    assert float((actual == expected).double().mean()) > 0.98
    assert float((other == expected).double().mean()) < 0.9


@needs_triton
def test_more_channels_than_a_program_takes_are_refused_whatever_stands_before_them(
    device: torch.device,
) -> None:
    x, weight = torch.ones(1, 1, 65536, device=device), torch.ones(65536, device=device)
    with (
        kernels.use_kernels("triton"),
        pytest.raises(KernelUnavailableError, match="channels = 65536 is more than 32768"),
    ):
        kernels.rms_norm(x, weight, 1e-6, 0.0, False)


@needs_triton
def test_not_a_number_stays_one(device: torch.device) -> None:
    x = tokens(3, 64).to(device)
    x[1, 7] = float("nan")
    for y in both(kernels.rms_norm, x, torch.ones(64, device=device), 1e-6, 0.0, False):
        assert y[1].isnan().all()
        assert y[[0, 2]].isfinite().all()
