"""Sums of outer products, of which half is kept: a Hessian is the largest thing that calibration measures."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SymmetricSum"]

_ROWS = 1024
_MOST_PARTS = 8


class SymmetricSum:
    """``Σ x xᵀ``, without most of what stands above its diagonal.

    Args:
        channels: of ``x``.
        device: where the sum lives.

    Attributes:
        parts: float32 ``[rows, columns]``, runs of rows, each up to the column where its diagonal ends; 9/16
            of a large matrix, all of a small one.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        count = min(max(channels // _ROWS, 1), _MOST_PARTS)
        ends = [channels * (i + 1) // count for i in range(count)]
        starts = [0, *ends[:-1]]
        self.parts = [
            torch.zeros(end - start, end, device=device) for start, end in zip(starts, ends, strict=True)
        ]

    @classmethod
    def of(cls, matrix: Tensor) -> SymmetricSum:
        """The sum that is this symmetric matrix ``[channels, channels]``."""
        result = cls(matrix.shape[0], matrix.device)
        for part in result.parts:
            part.copy_(matrix[part.shape[1] - part.shape[0] : part.shape[1], : part.shape[1]])
        return result

    def add(self, rows: Tensor) -> None:
        """Add vectors, float32 ``[tokens, channels]``."""
        for part in self.parts:
            own = rows[:, part.shape[1] - part.shape[0] : part.shape[1]]
            part.addmm_(own.t(), rows[:, : part.shape[1]])

    def diagonal(self) -> Tensor:
        """``Σ x²``, float32 ``[channels]``."""
        parts = [part[:, part.shape[1] - part.shape[0] :].diagonal() for part in self.parts]
        return torch.cat(parts)

    def matrix(self) -> Tensor:
        """The whole sum, float32 ``[channels, channels]``."""
        channels = self.parts[-1].shape[1]
        whole = self.parts[0].new_empty(channels, channels)
        for part in self.parts:
            end = part.shape[1]
            start = end - part.shape[0]
            whole[start:end, :end] = part
            whole[:start, start:end] = part[:, :start].t()
        return whole
