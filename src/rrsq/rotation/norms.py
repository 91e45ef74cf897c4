"""Taking gain and bias out of norms, so that what is left commutes with a rotation.

The pure division by the root mean square commutes with every orthogonal matrix. A LayerNorm also takes off
the mean over the channels; once everything that writes to the residual stream has a mean of zero (SliceGPT,
arXiv 2401.15024, section 3.2) there is none to take off, and an RMSNorm computes the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models import ModelFamily, NormKind
from .rotations import Rotations

__all__ = ["Affine", "read_affine", "replace_final_norm", "replace_layer_norms"]


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


def replace_layer_norms(layer: nn.Module, family: ModelFamily, rotations: Rotations) -> None:
    """Where R1 is folded, leave nothing but the division of the norms in front of a layer's inputs.

    A LayerNorm becomes an RMSNorm without parameters, for a model that is rotated and for one that is loaded.
    """
    if rotations.residual is not None:
        for path in family.layer_norms:
            _replace(layer, path, family.norm)


def replace_final_norm(model: nn.Module, family: ModelFamily, rotations: Rotations) -> None:
    """The same for the norm in front of the output head, which takes up the bias of a LayerNorm."""
    if rotations.residual is None:
        return
    norm: Any = model.get_submodule(family.final_norm)
    head: Any = model.get_submodule(family.head)
    if getattr(norm, "bias", None) is not None and head.bias is None:
        head.bias = nn.Parameter(torch.zeros_like(head.weight[:, 0]), requires_grad=False)
    _replace(model, family.final_norm, family.norm)


def _replace(root: nn.Module, path: str, kind: NormKind) -> None:
    norm: Any = root.get_submodule(path)
    if kind.centered:
        plain = nn.RMSNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False)
        root.set_submodule(path, plain)
    else:
        with torch.no_grad():
            norm.weight.fill_(1.0 - kind.offset)
