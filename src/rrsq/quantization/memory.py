"""How much memory weights take and a run needed."""

from __future__ import annotations

import resource
import sys
from types import TracebackType

import torch
from torch import nn

from ..models import family_for
from ..recipe import Recipe
from .report import QuantizationReport
from .scheme import head_is_kept, treatment

__all__ = ["PeakMemory", "least_checkpoint_bytes", "weight_bytes"]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and stored buffers, shared ones counted once."""
    seen: dict[int, int] = {}
    for tensor in model.state_dict().values():
        seen[tensor.data_ptr() or id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def least_checkpoint_bytes(model: nn.Module, recipe: Recipe) -> int:
    """A lower bound of a checkpoint: what is quantized by its bits, the rest as it is, the head untied."""
    family = family_for(model.config)
    parameters = dict(model.named_parameters())
    total = sum(tensor.numel() * tensor.element_size() for tensor in parameters.values())
    head = parameters.get(f"{family.head}.weight")
    kept = head_is_kept(recipe, family)
    if head is None:
        head = parameters[f"{family.embedding}.weight"]
        folded = recipe.rotation is not None and recipe.rotation.residual and family.folds_residual
        total += head.numel() * head.element_size() if folded or not kept else 0
    if not kept:
        total -= head.numel() * head.element_size() - head.numel() * recipe.head.bits // 8
    for index, layer in enumerate(model.get_submodule(family.layers).children()):
        name = family.layer_name(index)
        for entry in family.inputs_in(layer):
            quantized = treatment(recipe, name, entry).linears
            for linear, path in zip(entry.linears, entry.linear_paths, strict=True):
                if linear in quantized:
                    tensor = parameters[f"{name}.{path}" if entry.experts else f"{name}.{path}.weight"]
                    total -= tensor.numel() * tensor.element_size() - tensor.numel() // 2
    return total


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
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        report.peak_memory = peak if sys.platform == "darwin" else peak * 1024
        if self.device.type == "cuda":
            report.peak_gpu_memory = torch.cuda.max_memory_allocated(self.device)
