"""Taking gain and bias out of norms, so that what is left commutes with a rotation.

The pure division by the root mean square commutes with every orthogonal matrix. A LayerNorm also takes off
the mean over the channels; once everything that writes to the residual stream has a mean of zero (SliceGPT,
arXiv 2401.15024, section 3.2) there is none to take off, and an RMSNorm computes the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...models import NormKind

__all__ = ["Affine", "read_affine"]


@dataclass(frozen=True)
class Affine:
    """``y = x * gain + bias`` of a norm, float64 ``[channels]`` or a number; no bias is None."""

    gain: Tensor | float
    bias: Tensor | None = None


def read_affine(norm: Any, kind: NormKind) -> Affine:
    """The gain and bias that a norm of this kind applies."""
    gain = 1.0 if norm.weight is None else kind.offset + norm.weight.detach().double()
    bias = getattr(norm, "bias", None)
    return Affine(gain, None if bias is None else bias.detach().double())
