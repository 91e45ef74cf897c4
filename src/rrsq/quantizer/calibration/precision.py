"""How exact the products of calibration are on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["calibration_products"]


@contextmanager
def calibration_products(device: torch.device) -> Iterator[None]:
    """While open, float32 matrix products on CUDA round their factors to TF32 (11 bits) and sum in float32.

    Forward passes and Hessians are most of a run's arithmetic, and this makes them five times as fast or
    more. The factors are activations that are stored in bfloat16 (8 bits) between layers anyway; a Hessian of
    rounded inputs is still the Hessian of some inputs, hence positive semidefinite. Factorization and
    rounding of the weights stay outside, in full float32. On a CPU nothing changes.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
