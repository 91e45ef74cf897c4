"""What calibration measures of one linear input: its Hessian, magnitudes and, for the KV cache, means."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .hessian import SymmetricSum

__all__ = ["InputStatistics", "InputSummary", "LayerStatistics", "MeanStatistics"]


@dataclass(frozen=True)
class InputSummary:
    """What quantization needs to know of one linear input, in the basis in which it is quantized.

    Attributes:
        hessian: ``Σ x xᵀ``; None where it was not asked for.
        absmax: float32 ``[channels]``, largest magnitudes; None where they are not known.
    """

    hessian: SymmetricSum | None
    absmax: Tensor | None


@dataclass(frozen=True)
class LayerStatistics:
    """What quantization needs to know of one layer's activations.

    Attributes:
        inputs: by the input's path.
        means: float32 ``[kv_heads, head_dim]``, see :func:`.cache_statistics.collect_cache_means`.
    """

    inputs: dict[str, InputSummary]
    means: dict[str, Tensor]


class InputStatistics:
    """Accumulates ``Σ x xᵀ`` and the largest magnitude per channel.

    Args:
        channels: size of the input.
        device: where the sums live.
        with_hessian: False skips the Hessian (recipes that round to nearest).
    """

    def __init__(self, channels: int, device: torch.device, *, with_hessian: bool = True) -> None:
        self.tokens = 0
        self.absmax = torch.zeros(channels, device=device)
        self.hessian = SymmetricSum(channels, device) if with_hessian else None

    def add(self, x: Tensor) -> None:
        """Add activations ``[..., channels]``."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if not rows.shape[0]:
            return
        self.tokens += rows.shape[0]
        self.absmax = torch.maximum(self.absmax, rows.abs().amax(0))
        if self.hessian is not None:
            self.hessian.add(rows)


class MeanStatistics:
    """Accumulates the mean over tokens of ``[batch, tokens, ...]`` in float64."""

    def __init__(self) -> None:
        self.tokens = 0
        self.total: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Add outputs ``[batch, tokens, ...]``."""
        rows = x.detach().flatten(0, 1).double()
        self.tokens += rows.shape[0]
        total = rows.sum(0)
        self.total = total if self.total is None else self.total + total

    def mean(self) -> Tensor:
        """float32, of the shape behind the tokens."""
        if self.total is None:
            raise ValueError("no activations were added")
        return (self.total / self.tokens).float()
