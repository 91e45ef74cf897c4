"""The basis that stored statistics are in, and the way from there to the inputs that a recipe quantizes.

Where a family's norms can be folded, a linear input behind a norm is stored as what the norm divides, ``n``,
without its gain and bias; every other input as the network has it. With R1, a recipe's input is ``n R`` (gain
and bias are folded into the linears), without it ``n * gain + bias``, rotated online where a recipe does
that. So ``Rᵀ H R`` is its Hessian, of ``H = Σ n nᵀ`` or of what gain and bias make of that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...models import LinearInput, ModelFamily, ModelSizes
from ...runtime.modules.norms import replace_final_norm
from ...runtime.modules.rotation import online_rotation
from ...runtime.rotation.hadamard import HadamardPlan
from ...runtime.rotation.rotations import RandomizedHadamard, Rotations
from ..fold.norms import Affine, read_affine
from ..fold.rotations import fold_embedding, fold_layer

__all__ = [
    "InputBasis",
    "affine_of_head",
    "affine_of_input",
    "apply_affine",
    "take_out_norm_of_head",
    "take_out_norms",
    "take_out_norms_of_embedding",
]


class InputBasis:
    """From the stored basis of one input to the basis in which a recipe quantizes it.

    Attributes:
        rotate: ``x @ R`` for ``[..., channels]``: rotates activations, and the columns of a weight.
        affine: the norm's gain and bias where the recipe does not fold them; else None.
    """

    def __init__(self, rotate: Callable[[Tensor], Tensor], affine: Affine | None) -> None:
        self.rotate = rotate
        self.affine = affine

    @classmethod
    def of_input(
        cls, entry: LinearInput, channels: int, rotations: Rotations, affine: Affine | None
    ) -> InputBasis:
        """Of a linear input; ``affine`` is :func:`affine_of_input`'s."""
        online = online_rotation(entry, rotations, channels)

        def rotate(x: Tensor) -> Tensor:
            if entry.reads_residual and rotations.residual is not None:
                x = rotations.residual.apply(x)
            if entry.name == "o" and rotations.head is not None:
                x = rotations.head.apply(x.unflatten(-1, (-1, rotations.head.plan.size))).flatten(-2)
            return x if online is None else online(x)

        return cls(rotate, _unless_folded(affine, rotations))

    @classmethod
    def of_head(cls, rotations: Rotations, affine: Affine | None) -> InputBasis:
        """Of the output head's input; ``affine`` is :func:`affine_of_head`'s."""
        residual = rotations.residual
        return cls(_unchanged if residual is None else residual.apply, _unless_folded(affine, rotations))

    def balanced(self, factors: Tensor) -> InputBasis:
        """The basis of ``x * factors``, ``[channels]``, where these are folded into the norm's gain."""
        rotate = self.rotate
        return InputBasis(lambda x: rotate(x * factors), self.affine)

    def energy(self, mean: Tensor, square: Tensor) -> Tensor:
        """Mean squares ``[channels]`` before any rotation, from the stored inputs' means and mean squares."""
        if self.affine is None:
            return square
        gain, bias = _plain(self.affine.gain, mean), _plain(self.affine.bias, mean)
        return gain**2 * square + 2 * gain * bias * mean + bias**2

    def rows(self, x: Tensor) -> Tensor:
        """Stored activations ``[..., channels]`` as the recipe's linears see them."""
        return self.rotate(apply_affine(x, self.affine))

    def hessian(self, stored: Tensor, mean: Tensor, tokens: int) -> Tensor:
        """``Σ x xᵀ`` of the recipe's inputs.

        Args:
            stored: float32 ``[channels, channels]``, the same of the stored ones.
            mean: float32 ``[channels]``, their mean.
            tokens: how many there were.
        """
        if self.affine is not None:
            gain, bias = _plain(self.affine.gain, mean), _plain(self.affine.bias, mean)
            scaled = gain * mean
            stored = gain.unsqueeze(1) * stored * gain
            stored = stored + tokens * (
                torch.outer(scaled, bias) + torch.outer(bias, scaled) + torch.outer(bias, bias)
            )
        return self.rotate(self.rotate(stored).t()).contiguous()


def affine_of_input(layer: nn.Module, entry: LinearInput, family: ModelFamily) -> Affine | None:
    """Gain and bias that lie between the stored input and the network's, a copy; None where nothing does."""
    if entry.norm is None or not family.folds_residual:
        return None
    return read_affine(layer.get_submodule(entry.norm), family.norm)


def affine_of_head(model: nn.Module, family: ModelFamily) -> Affine | None:
    """The same for the input of the output head."""
    if not family.folds_residual:
        return None
    return read_affine(model.get_submodule(family.final_norm), family.norm)


def apply_affine(x: Tensor, affine: Affine | None) -> Tensor:
    """``x * gain + bias`` in the precision of ``x`` ``[..., channels]``."""
    if affine is None:
        return x
    x = x * (affine.gain if isinstance(affine.gain, float) else affine.gain.to(x))
    return x if affine.bias is None else x + affine.bias.to(x)


def take_out_norms_of_embedding(model: nn.Module, family: ModelFamily, sizes: ModelSizes) -> None:
    """What :func:`take_out_norms` needs of the embedding, in place: for LayerNorms, a mean of zero."""
    if family.folds_residual and family.norm.centered:
        fold_embedding(model, family, _no_rotation(sizes))


def take_out_norms(layer: nn.Module, family: ModelFamily, sizes: ModelSizes) -> None:
    """Fold what norms do but divide into the linears behind them, in place: inputs are then as stored."""
    if family.folds_residual:
        fold_layer(layer, family, _no_rotation(sizes), sizes)


def take_out_norm_of_head(model: nn.Module, family: ModelFamily, sizes: ModelSizes) -> nn.Module:
    """Leave nothing but the division of the final norm, in place, and return it; the head is not made fit."""
    if family.folds_residual:
        replace_final_norm(model, family, _no_rotation(sizes))
    return model.get_submodule(family.final_norm)


def _no_rotation(sizes: ModelSizes) -> Rotations:
    """R1 with blocks of one channel and no signs: folding it folds the norms and nothing else."""
    plan = HadamardPlan(sizes.hidden, block=1, base=1)
    return Rotations(residual=RandomizedHadamard(torch.ones(sizes.hidden, dtype=torch.float64), plan))


def _unless_folded(affine: Affine | None, rotations: Rotations) -> Affine | None:
    return affine if rotations.residual is None else None


def _unchanged(x: Tensor) -> Tensor:
    return x


def _plain(value: Any, like: Tensor) -> Tensor:
    """A gain or bias as a vector: zero where there is none."""
    return torch.as_tensor(0.0 if value is None else value).to(like).expand_as(like)
