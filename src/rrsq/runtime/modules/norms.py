"""Norms of a model that R1 is folded into: nothing but the division is left of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...models import ModelFamily, NormKind
from ..rotation.rotations import Rotations

__all__ = ["replace_final_norm", "replace_layer_norms"]


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
