"""What the machine can do at most, measured: memory bandwidth and matrix rates."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .timing import time_calls

__all__ = ["Ceilings", "measure_ceilings"]


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of one device."""

    bytes_per_second: float
    """Bytes read and written by a large copy."""
    bf16_operations_per_second: float
    """Multiplications and additions of a large bfloat16 product by the library."""


def measure_ceilings(device: torch.device, seconds: float = 0.2) -> Ceilings:
    """Time a large copy and a large bfloat16 product on random data."""
    on_gpu = device.type == "cuda"
    size = 1 << (30 if on_gpu else 26)
    source = torch.randint(0, 100, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = time_calls([lambda: target.copy_(source)], device, seconds, False)
    side = 8192 if on_gpu else 512
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = time_calls([lambda: torch.mm(a, b)], device, seconds, False)
    return Ceilings(2 * size / copy * 1e6, 2 * side**3 / product * 1e6)
