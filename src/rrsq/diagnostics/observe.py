"""What is gathered of one linear input while calibration text runs through its layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantizer.calibration.basis import InputBasis, apply_affine
from ..quantizer.calibration.statistics import InputStatistics
from ..quantizer.fold.norms import Affine

__all__ = ["ObservedInput", "sample_shape"]

_SAMPLE_TOKENS = 2048


def sample_shape(num_samples: int, sequence_length: int) -> tuple[int, int]:
    """Windows, and tokens of each, of the sample that errors are measured on: 2048 tokens at most."""
    return min(num_samples, max(1, _SAMPLE_TOKENS // sequence_length)), min(sequence_length, _SAMPLE_TOKENS)


class ObservedInput(InputStatistics):
    """Statistics of an input in the stored basis, and a sample of its activations.

    Args:
        channels: size of the input.
        device: where the sums live.
        basis: the way to the recipe's basis.
        affine: what lies between the stored input and the network's, or None.
        window_length: tokens of a window.
        with_hessian: False skips the Hessian.

    Attributes:
        sums, squares: float64 ``[channels]``, ``Σ x`` and ``Σ x²``.
        absmax_rotated: float32 ``[channels]``, largest magnitudes in the recipe's basis.
        token_absmax: largest magnitude of each token as the network has it, a float32 tensor a batch.
        sample: the first windows, float32 ``[windows, tokens, channels]``; see :func:`sample_shape`.
    """

    def __init__(
        self,
        channels: int,
        device: torch.device,
        basis: InputBasis,
        affine: Affine | None,
        window_length: int,
        *,
        with_hessian: bool,
    ) -> None:
        super().__init__(channels, device, with_hessian=with_hessian)
        self.basis = basis
        self.affine = affine
        self.sums = torch.zeros(channels, device=device, dtype=torch.float64)
        self.squares = torch.zeros(channels, device=device, dtype=torch.float64)
        self.absmax_rotated = torch.zeros(channels, device=device)
        self.window_length = window_length
        self.token_absmax: list[Tensor] = []
        self.sample: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Add activations of whole windows, ``[windows, tokens, channels]`` or flattened to tokens."""
        super().add(x)
        rows = x.detach().float().reshape(-1, self.window_length, x.shape[-1])
        self.sums += rows.sum((0, 1), dtype=torch.float64)
        self.squares += rows.square().sum((0, 1), dtype=torch.float64)
        rotated = self.basis.rows(rows).abs().flatten(0, 1).amax(0)
        self.absmax_rotated = torch.maximum(self.absmax_rotated, rotated)
        self.token_absmax.append(self.original(rows).abs().amax(2).flatten())
        if self.sample is None:
            windows, tokens = sample_shape(*rows.shape[:2])
            self.sample = rows[:windows, :tokens].clone()

    def original(self, x: Tensor) -> Tensor:
        """Activations as the network has them, from those in the stored basis."""
        return apply_affine(x, self.affine)
