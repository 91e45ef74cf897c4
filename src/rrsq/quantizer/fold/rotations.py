"""Folding rotations into weights (QuaRot, arXiv 2404.00456, section 4; SpinQuant's names R1, R2, R4).

With the row convention ``x' = x R``: a linear that reads a rotated input gets ``W R``, one that writes it
gets ``Rᵀ W`` and the bias ``b R``. A norm's gain (and bias) goes into the linears behind it first, since only
the pure division by the root mean square commutes with R. All of it is done in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UnsupportedArchitectureError
from ...models import ModelFamily, ModelSizes
from ...runtime.assemble import open_experts
from ...runtime.modules.norms import replace_final_norm, replace_layer_norms
from ...runtime.rotation.rotations import Rotations
from .norms import Affine, read_affine
from .online import matrices, rotate_input_online, rows_at_once

__all__ = ["fold_embedding", "fold_head", "fold_layer", "rotate_model", "untie_head"]

Rotate = Callable[[Tensor], Tensor]


def untie_head(model: nn.Module, family: ModelFamily) -> None:
    """Give the output head weights of its own: it takes the final norm's gain, the embedding does not."""
    head, embedding = _module(model, family.head), _module(model, family.embedding)
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    config: Any = model.config
    config.tie_word_embeddings = False


def fold_embedding(model: nn.Module, family: ModelFamily, rotations: Rotations) -> None:
    """Rotate the rows of the embedding (and of learned positions) by R1, in place."""
    if rotations.residual is None:
        return
    write = _writer(family, rotations.residual.apply)
    for path in (family.embedding, family.positions):
        if path is not None:
            _change_rows(_module(model, path).weight, write)


def fold_head(model: nn.Module, family: ModelFamily, rotations: Rotations) -> None:
    """Fold the final norm and R1 into the output head, in place; a LayerNorm's bias gives the head one."""
    if rotations.residual is None:
        return
    affine = read_affine(_module(model, family.final_norm), family.norm)
    replace_final_norm(model, family, rotations)
    _fold_reader(_module(model, family.head), affine, rotations.residual.apply)


def fold_layer(layer: nn.Module, family: ModelFamily, rotations: Rotations, sizes: ModelSizes) -> None:
    """Fold all rotations into one decoder layer, in place.

    Linears whose input is rotated online become :class:`~rrsq.runtime.modules.rotation.RotatedLinear`.

    Raises:
        ValueError: R1 is asked for and a norm of the family stands in its way.
        UnsupportedArchitectureError: a norm's bias has no bias of a linear to go into.
    """
    if rotations.residual is not None and not family.folds_residual:
        raise ValueError(f"R1 cannot be folded into {family.model_type}: a norm follows its linears")
    if rotations.residual is not None:
        _fold_residual(layer, family, rotations, rotations.residual.apply)
    if rotations.head is not None:
        _fold_head_dim(layer, family, rotations.head.apply, sizes)
    if rotations.blocks is None:  # Blocks come later: see .blocks.
        for entry in family.inputs_in(layer):
            rotate_input_online(layer, entry, rotations)


def rotate_model(model: nn.Module, family: ModelFamily, rotations: Rotations, sizes: ModelSizes) -> nn.Module:
    """Fold all rotations into a whole model, in place; its logits stay what they were."""
    if rotations.residual is not None:
        untie_head(model, family)
    fold_embedding(model, family, rotations)
    for layer in _module(model, family.layers):
        open_experts(layer, family)
        fold_layer(layer, family, rotations, sizes)
        if rotations.blocks is not None:
            for entry in family.inputs_in(layer):
                rotate_input_online(layer, entry, rotations)
    fold_head(model, family, rotations)
    return model


def _fold_residual(layer: nn.Module, family: ModelFamily, rotations: Rotations, rotate: Rotate) -> None:
    """R1, and the gains of the norms, in all linears that read or write the residual stream."""
    affine = {path: read_affine(_module(layer, path), family.norm) for path in family.layer_norms}
    replace_layer_norms(layer, family, rotations)
    write = _writer(family, rotate)
    for entry in family.inputs_in(layer):
        if entry.reads_residual:
            read = affine[entry.norm] if entry.norm else Affine(1.0)
            for path in (*entry.linear_paths, *entry.full_precision):
                _fold_reader(_module(layer, path), read, rotate)
        else:
            for path in entry.linear_paths:
                _fold_writer(_module(layer, path), write)


def _fold_head_dim(layer: nn.Module, family: ModelFamily, rotate: Rotate, sizes: ModelSizes) -> None:
    """R2: the values' rows of their projection, which are its last ones, and o_proj's columns."""

    def per_head(rows: Tensor) -> Tensor:
        return rotate(rows.unflatten(-1, (-1, sizes.head_dim))).flatten(-2)

    value = _module(layer, f"{family.attention}.{family.value}")
    rows = value.weight.shape[0]
    _fold_writer(value, per_head, slice(rows - sizes.kv_heads * sizes.head_dim, rows))
    for path in family.input("o").linear_paths:
        _change_rows(_module(layer, path).weight, per_head)


def _fold_reader(linear: Any, affine: Affine, rotate: Rotate) -> None:
    """``W (x * gain + bias)`` for a rotated ``x``: gain and R go into W, the bias into the linear's."""
    if affine.bias is not None:
        if linear.bias is None:
            raise UnsupportedArchitectureError(
                "A LayerNorm has a bias and a linear behind it has none that could take it up, so that R1"
                " cannot be folded. Use --set rotation.residual=false."
            )
        _assign(linear.bias, _double(linear.bias) + _double(linear.weight) @ affine.bias)
    for matrix in matrices(linear.weight):
        _change_rows(matrix, lambda rows: rotate(rows * affine.gain))


def _fold_writer(linear: Any, rotate: Rotate, rows: slice = slice(None)) -> None:
    """Rotate a linear's outputs, or some of them."""
    for matrix in matrices(linear.weight):
        _change_rows(matrix[rows].t(), rotate)
    if linear.bias is not None:
        _assign(linear.bias[rows], rotate(_double(linear.bias[rows])))


def _writer(family: ModelFamily, rotate: Rotate) -> Rotate:
    """What happens to all that is added to the residual stream: LayerNorms want a mean of zero first."""
    if not family.norm.centered:
        return rotate
    return lambda rows: rotate(rows - rows.mean(-1, keepdim=True))


def _module(root: nn.Module, path: str) -> Any:
    """The module at a path the family names; its weight and bias are the family's promise."""
    return root.get_submodule(path)


def _change_rows(matrix: Tensor, change: Rotate) -> None:
    """Put ``change`` of its rows, in float64, in the place of each row; some at a time, for memory's sake."""
    for rows in matrix.detach().split(rows_at_once(matrix.shape[-1])):
        _assign(rows, change(_double(rows)))


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().double()


def _assign(target: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        target.copy_(value)
