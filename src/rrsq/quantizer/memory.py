"""How much memory weights take and a run needed."""

from __future__ import annotations

import sys
from types import TracebackType

import psutil
import torch
from torch import nn

from .outcome import QuantizationReport

__all__ = ["PeakMemory", "weight_bytes"]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and stored buffers, shared ones counted once."""
    seen: dict[int, int] = {}
    for tensor in model.state_dict().values():
        seen[tensor.data_ptr() or id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


class PeakMemory:
    """Context that watches a run's memory; :meth:`write` puts the peaks into its report."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def write(self, report: QuantizationReport) -> None:
        """Peak resident bytes of the process and, on CUDA, peak allocated bytes."""
        report.peak_memory = _peak_resident()
        if self.device.type == "cuda":
            report.peak_gpu_memory = torch.cuda.max_memory_allocated(self.device)


def _peak_resident() -> int:
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # Of Unix only.

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
