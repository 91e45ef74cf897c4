"""Folding rotations into weights (QuaRot, arXiv 2404.00456, section 4; SpinQuant's names R1, R2, R4).

With the row convention ``x' = x R``: a linear that reads a rotated input gets ``W R``, one that writes it
gets ``Rᵀ W`` and the bias ``b R``. RMSNorm's gain goes into the linears behind it first, since only the pure
division by the root mean square commutes with R. All of it is done in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..models import LinearInput, ModelFamily
from ..nn.rotation import OnlineHadamard, RotatedLinear
from .hadamard import HadamardPlan
from .rotations import Rotations

__all__ = ["fold_embedding", "fold_head", "fold_layer", "rotate_model", "untie_head"]


def untie_head(model: nn.Module, family: ModelFamily) -> None:
    """Give the output head weights of its own: it takes the final norm's gain, the embedding does not."""
    head, embedding = _module(model, family.head), _module(model, family.embedding)
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    config: Any = model.config
    config.tie_word_embeddings = False


def fold_embedding(model: nn.Module, family: ModelFamily, rotations: Rotations) -> None:
    """Rotate the embedding's rows by R1, in place."""
    if rotations.residual is not None:
        weight = _module(model, family.embedding).weight
        _assign(weight, rotations.residual.apply(_double(weight)))


def fold_head(model: nn.Module, family: ModelFamily, rotations: Rotations) -> None:
    """Fold the final norm's gain and R1 into the output head, in place."""
    if rotations.residual is None:
        return
    head = _module(model, family.head)
    gain = _take_gain(_module(model, family.final_norm))
    _assign(head.weight, rotations.residual.apply(_double(head.weight) * gain))


def fold_layer(layer: nn.Module, family: ModelFamily, rotations: Rotations, head_dim: int) -> None:
    """Fold all rotations into one decoder layer, in place.

    Linears whose input is rotated online become :class:`~rrsq.nn.rotation.RotatedLinear`.
    """
    for entry in family.inputs:
        if rotations.residual is not None:
            gain = None if entry.norm is None else _take_gain(_module(layer, entry.norm))
            for linear in _linears(layer, entry):
                if gain is not None:
                    _assign(linear.weight, rotations.residual.apply(_double(linear.weight) * gain))
                if entry.writes_residual:
                    _rotate_outputs(linear, rotations.residual.apply)
    _fold_head_dim(layer, family, rotations, head_dim)
    _rotate_online(layer, family.input("o"), rotations.across_heads, inner=head_dim)
    _rotate_online(layer, family.input("down"), rotations.intermediate, inner=1)


def rotate_model(model: nn.Module, family: ModelFamily, rotations: Rotations, head_dim: int) -> nn.Module:
    """Fold all rotations into a whole model, in place; its logits stay what they were."""
    if rotations.residual is not None:
        untie_head(model, family)
    fold_embedding(model, family, rotations)
    for layer in _module(model, family.layers):
        fold_layer(layer, family, rotations, head_dim)
    fold_head(model, family, rotations)
    return model


def _fold_head_dim(layer: nn.Module, family: ModelFamily, rotations: Rotations, head_dim: int) -> None:
    if rotations.head is None:
        return
    head = rotations.head

    def per_head(rows: Tensor) -> Tensor:
        return head.apply(rows.unflatten(-1, (-1, head_dim))).flatten(-2)

    value = _module(layer, f"{family.attention}.{family.value}")
    _rotate_outputs(value, per_head)
    for linear in _linears(layer, family.input("o")):
        _assign(linear.weight, per_head(_double(linear.weight)))


def _rotate_online(layer: nn.Module, entry: LinearInput, plan: HadamardPlan | None, inner: int) -> None:
    if plan is None:
        return
    parent = _module(layer, entry.parent)
    for name in entry.linears:
        linear = getattr(parent, name)
        rotation = OnlineHadamard(plan, inner)
        _assign(linear.weight, rotation(_double(linear.weight)))
        setattr(parent, name, RotatedLinear(rotation, linear))


def _rotate_outputs(linear: Any, rotate: Callable[[Tensor], Tensor]) -> None:
    _assign(linear.weight, rotate(_double(linear.weight).t()).t())
    if linear.bias is not None:
        _assign(linear.bias, rotate(_double(linear.bias)))


def _take_gain(norm: Any) -> Tensor:
    """The norm's gain in float64; the norm is left with a gain of one."""
    gain = _double(norm.weight)
    _assign(norm.weight, torch.ones_like(gain))
    return gain


def _linears(layer: nn.Module, entry: LinearInput) -> list[Any]:
    parent = _module(layer, entry.parent)
    return [getattr(parent, name) for name in entry.linears]


def _module(root: nn.Module, path: str) -> Any:
    """The module at a path the family names; its weight and bias are the family's promise."""
    return root.get_submodule(path)


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().double()


def _assign(target: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        target.copy_(value)
