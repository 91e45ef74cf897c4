"""Triton where it is installed, and what launchers ask about the machine.

Kernels stand beside their operation's reference, which has to be importable without triton (macOS, Windows, a
CPU-only installation): ``from ._triton import tl, triton`` then gives stand-ins with which kernels can be
defined, but not launched.

Launchers of linears and of what makes their inputs pass a kernel's constants by position, in the order of its
parameters: by name they cost the host half a microsecond more, in each function of Triton's on the way.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from typing import Any

import torch

__all__ = ["COMPILED", "ceil_div", "libdevice", "next_power_of_two", "processors", "tl", "triton"]


class _KernelWithoutTriton:
    """What a kernel is without triton."""

    def __init__(self, function: Any) -> None:
        self.name = function.__name__

    def __getitem__(self, grid: Any) -> Any:
        raise ModuleNotFoundError(f"{self.name} needs triton: pip install 'rrsq[gpu]'")


class _Language:
    """The part of ``triton.language`` that is evaluated when kernels are defined."""

    @staticmethod
    def constexpr(value: Any) -> Any:
        return value


class _Triton:
    """The part of ``triton`` that is evaluated when kernels are defined."""

    language = _Language()

    @staticmethod
    def jit(function: Any = None, **options: Any) -> Any:
        return _KernelWithoutTriton if function is None else _KernelWithoutTriton(function)


triton: Any = _Triton()
with contextlib.suppress(ImportError):
    triton = importlib.import_module("triton")
tl: Any = triton.language
libdevice: Any = None
"""CUDA's functions of real numbers, which are not in the interpreter."""
with contextlib.suppress(ImportError):
    libdevice = importlib.import_module("triton.language.extra.cuda.libdevice")


@triton.jit
def _probe() -> None:
    pass


COMPILED = type(_probe).__name__ == "JITFunction"
"""Whether kernels are compiled for a GPU, and not run in Triton's interpreter (``TRITON_INTERPRET=1``).

Inline PTX and bfloat16 products exist there only.
"""


@functools.cache
def processors(device: torch.device) -> int:
    """Number of multiprocessors of a GPU; 1 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


# Triton's own functions of these names take 1.4 µs on the host.
def ceil_div(number: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-number // divisor)


def next_power_of_two(number: int) -> int:
    """The least power of two that is not below ``number``."""
    return 1 << (number - 1).bit_length()
