"""What the launchers ask about the machine they run on."""

from __future__ import annotations

import functools

import torch
import triton

from .gemv_kernel import gemv_kernel

__all__ = ["compiled", "processors"]


@functools.cache
def compiled() -> bool:
    """Whether kernels are compiled for a GPU, and not run in Triton's interpreter (``TRITON_INTERPRET=1``).

    Inline PTX and bfloat16 products exist there only.
    """
    return isinstance(gemv_kernel, triton.runtime.JITFunction)


@functools.cache
def processors(device: torch.device) -> int:
    """Number of multiprocessors of a GPU; 1 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
