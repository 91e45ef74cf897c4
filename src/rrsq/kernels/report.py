"""Which kernels a device would use, and why not the others: for ``rrsq doctor`` and ``rrsq bench``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import registry
from .dispatch import Call, Candidate, explain, forced_backend

__all__ = ["KernelReport", "kernel_report"]

_TYPICAL_SIZES = {
    "channels": 4096,
    "group_size": 32,
    "tokens": 16,
    "in_features": 4096,
    "out_features": 4096,
    "weight_group_size": 32,
}
_SIZES_OF = {
    "hadamard_transform": ("channels",),
    "quantize_folded": ("channels", "group_size"),
    "quantize_smoothed": ("channels", "group_size"),
    "weight_operand": ("in_features", "out_features", "weight_group_size"),
    "linear_folded": ("tokens", "in_features", "out_features", "weight_group_size"),
    "linear_group_scaled": ("tokens", "in_features", "out_features", "group_size"),
    "linear_weight_only": ("tokens", "in_features", "out_features", "weight_group_size"),
    "grouped_linear": ("tokens", "in_features", "out_features", "weight_group_size"),
}


@dataclass(frozen=True)
class KernelReport:
    """The candidates of one operation, best first."""

    operation: str
    chosen: str | None
    """Name of the kernel that would be used, or None where nothing fits."""
    rejected: tuple[tuple[str, str], ...]
    """(kernel, reasons) of every candidate that cannot serve the call."""


def kernel_report(
    device: torch.device | str, dtype: torch.dtype = torch.bfloat16, **sizes: int
) -> list[KernelReport]:
    """Report for each operation which kernel would serve a typical call on ``device``.

    Args:
        device: a CPU or CUDA device.
        dtype: floating-point dtype of activations and outputs.
        sizes: replaces typical sizes (``tokens``, ``in_features``, ``out_features``, ``channels``,
            ``group_size``, ``weight_group_size``).
    """
    values = _TYPICAL_SIZES | sizes
    return [_report(operation, torch.device(device), dtype, values) for operation in registry.OPERATIONS]


def _report(operation: str, device: torch.device, dtype: torch.dtype, values: dict[str, int]) -> KernelReport:
    named = (("x", dtype), ("out_dtype", dtype), ("operand", torch.int8))
    call = Call(operation, device, named, tuple((name, values[name]) for name in _SIZES_OF[operation]))
    candidates: list[Candidate] = explain(call, forced_backend())
    chosen = next((c.kernel.name for c in candidates if not c.reasons), None)
    rejected = tuple((c.kernel.name, "; ".join(c.reasons)) for c in candidates if c.reasons)
    return KernelReport(operation, chosen, rejected)
