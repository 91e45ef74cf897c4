"""Constructions of Hadamard matrices, and the list of them in order of preference.

A construction says which orders it reaches (:attr:`Construction.covers`, cheap) and builds the matrix
(:attr:`Construction.build`). Adding one is a file in this folder and an entry in :data:`CONSTRUCTIONS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rrsq.runtime.rotation.constructions.paley import is_paley_one, is_paley_two, paley_one, paley_two
from rrsq.runtime.rotation.constructions.turyn import is_turyn, turyn
from rrsq.runtime.rotation.constructions.williamson import is_williamson, williamson

__all__ = ["CONSTRUCTIONS", "Construction", "find_construction"]


@dataclass(frozen=True)
class Construction:
    """One way to build Hadamard matrices: int8 ``[order, order]`` of ±1 with ``H Hᵀ = order · I``."""

    name: str
    covers: Callable[[int], bool]
    build: Callable[[int], Tensor]


CONSTRUCTIONS = (
    Construction("Paley I", is_paley_one, paley_one),
    Construction("Paley II", is_paley_two, paley_two),
    Construction("Williamson", is_williamson, williamson),
    Construction("Turyn", is_turyn, turyn),
)


def find_construction(order: int) -> Construction | None:
    """The first construction that reaches ``order``, or None."""
    return next((c for c in CONSTRUCTIONS if c.covers(order)), None)
