"""Which inputs are rotated online, at run time, in front of their linears."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...models import LinearInput
from ...runtime.modules.rotation import RotatedLinear, online_rotation
from ...runtime.rotation.rotations import Rotations

__all__ = ["matrices", "rotate_input_online", "rows_at_once"]

_ELEMENTS_AT_ONCE = 2**24


def matrices(weight: Tensor) -> Tensor:
    """Views of the matrices ``[out, in]`` of a weight, one for each expert where it has several.

    Folding takes them one by one, for the sake of memory: it is done in float64.
    """
    return weight.detach() if weight.ndim == 3 else weight.detach().unsqueeze(0)


def rows_at_once(columns: int) -> int:
    """How many rows of a matrix are folded at once: in float64, with a few copies of them."""
    return max(1, _ELEMENTS_AT_ONCE // columns)


def rotate_input_online(layer: nn.Module, entry: LinearInput, rotations: Rotations) -> None:
    """Rotate an input online and fold the inverse into its linears, in place.

    The linears become :class:`.RotatedLinear`; nothing changes where there is no rotation.
    """
    for path in entry.linear_paths:
        linear: Any = layer.get_submodule(path)
        rotation = online_rotation(entry, rotations, linear.weight.shape[-1])
        if rotation is None:
            return
        with torch.no_grad():
            for matrix in matrices(linear.weight):
                for rows in matrix.split(rows_at_once(matrix.shape[-1])):
                    rows.copy_(rotation(rows.double()))
        layer.set_submodule(path, RotatedLinear(rotation, linear))
