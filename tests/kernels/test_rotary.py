"""RoPE: the reference against transformers' own and complex numbers, the kernel against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rrsq import kernels

from .problems import both, needs_triton

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def problem(
    head_dim: int,
    rotated: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    batches: int = 1,
    tokens: int = 3,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Heads as projections give them, one part of a row, and the angles of random positions."""
    generator = torch.Generator().manual_seed(4)
    row = torch.randn(2, tokens, 12 * head_dim, generator=generator).to(device, dtype)
    query, key, _ = row.split([9 * head_dim, 2 * head_dim, head_dim], dim=-1)
    heads = [x.unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in (query, key)]
    angle = 6 * torch.rand(batches, tokens, rotated // 2, generator=generator).repeat(1, 1, 2)
    return heads[0], heads[1], angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def test_the_reference_turns_pairs_of_channels() -> None:
    query, key, cos, sin = problem(12, 8, torch.float32, torch.device("cpu"))
    for x, y in zip((query, key), kernels.rotary.reference(query, key, cos, sin), strict=True):
        turn = torch.complex(cos[..., :4].double(), sin[..., :4].double())[:, None]
        expected = torch.complex(x[..., :4].double(), x[..., 4:8].double()) * turn
        torch.testing.assert_close(y[..., :4].double(), expected.real, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(y[..., 4:8].double(), expected.imag, rtol=1e-6, atol=1e-6)
        assert torch.equal(y[..., 8:], x[..., 8:])


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotated"), [(16, 16), (20, 20), (12, 8), (96, 72), (64, 64)])
@pytest.mark.parametrize("batches", [1, 2])
def test_the_kernel_has_the_reference_s_bits(
    head_dim: int, rotated: int, batches: int, dtype: torch.dtype, device: torch.device
) -> None:
    arguments = problem(head_dim, rotated, dtype, device, batches=batches)
    for actual, expected in zip(*both(kernels.rotary, *arguments), strict=True):
        assert torch.equal(actual, expected)
        assert actual.stride() == expected.stride()
        assert actual.transpose(1, 2).is_contiguous()


@needs_triton
def test_angles_in_float32_of_heads_in_16_bits(device: torch.device) -> None:
    query, key, cos, sin = problem(16, 16, torch.bfloat16, device)
    for actual, expected in zip(*both(kernels.rotary, query, key, cos.float(), sin.float()), strict=True):
        assert actual.dtype == torch.bfloat16
        assert torch.equal(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 17, 2048])
@pytest.mark.parametrize(("head_dim", "rotated"), [(128, 128), (96, 96), (256, 256), (128, 96), (80, 32)])
def test_real_sizes(head_dim: int, rotated: int, tokens: int, device: torch.device) -> None:
    arguments = problem(head_dim, rotated, torch.bfloat16, device, tokens=tokens)
    for actual, expected in zip(*both(kernels.rotary, *arguments), strict=True):
        assert torch.equal(actual, expected)
