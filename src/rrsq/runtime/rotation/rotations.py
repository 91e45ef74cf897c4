"""The rotations of one model: which there are, their signs and their Hadamard plans."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...models import ModelSizes
from ...recipe import Rotation
from .hadamard import HadamardPlan, is_known_order, plan_hadamard, rotate_columns

__all__ = ["RandomizedHadamard", "Rotations", "make_rotations"]


@dataclass(frozen=True)
class RandomizedHadamard:
    """The orthogonal matrix ``diag(signs) · H`` with the orthonormal (block-diagonal) Hadamard matrix ``H``.

    Attributes:
        signs: float64 ``[size]`` of ±1.
        plan: the Hadamard factorization of ``size``.
    """

    signs: Tensor
    plan: HadamardPlan

    def apply(self, rows: Tensor) -> Tensor:
        """``rows @ R`` for float ``rows`` ``[..., size]``."""
        return rotate_columns(rows * self.signs.to(rows), self.plan)


@dataclass(frozen=True)
class Rotations:
    """The rotations of a model; None where one is not applied.

    Attributes:
        residual: R1, hidden size, folded.
        residual_online: in place of R1 where it cannot be folded: hidden size, online on every input that
            reads the residual stream.
        head: R2, head_dim, folded into values and o_proj.
        across_heads: the head index of o_proj's input, online.
        intermediate: R4, down_proj's input, online.
        more_intermediate: R4 for MLPs of other sizes in the same model.
        blocks: in place of all but ``head``: every input online, in blocks of so many channels.
    """

    residual: RandomizedHadamard | None = None
    residual_online: HadamardPlan | None = None
    head: RandomizedHadamard | None = None
    across_heads: HadamardPlan | None = None
    intermediate: HadamardPlan | None = None
    more_intermediate: tuple[HadamardPlan, ...] = ()
    blocks: int | None = None

    def intermediate_of(self, size: int) -> HadamardPlan | None:
        """R4 for an MLP of ``size`` channels, or None."""
        plans = (self.intermediate, *self.more_intermediate)
        return next((plan for plan in plans if plan is not None and plan.size == size), None)

    def describe(self) -> dict[str, Any]:
        """Plain data for ``config.json``: of each rotation the size, the block and the order of its base."""

        def plan(p: HadamardPlan | None) -> dict[str, int] | None:
            return None if p is None else {"size": p.size, "block": p.block, "base": p.base}

        return {
            "residual": plan(self.residual.plan if self.residual else None),
            "residual_online": plan(self.residual_online),
            "head": plan(self.head.plan if self.head else None),
            "across_heads": plan(self.across_heads),
            "intermediate": plan(self.intermediate),
            "more_intermediate": [plan(p) for p in self.more_intermediate] or None,
            "blocks": self.blocks,
        }


def _signs(size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1


def make_rotations(
    recipe: Rotation | None, sizes: ModelSizes, seed: int, *, folds_residual: bool = True
) -> Rotations:
    """Choose the rotations of a model.

    Args:
        recipe: which rotations to apply; None for none.
        sizes: the model's sizes.
        seed: of the random signs of R1 and R2.
        folds_residual: R1 can be folded (:attr:`ModelFamily.folds_residual`); else it is applied online.

    Returns:
        The rotations. R4 and the rotation across heads stay within the recipe's shards. The latter is left
        out where no Hadamard matrix has as many rows as a shard has heads (9 or 14, for example); R1, R2 and
        R4 fall back to block-diagonal matrices, which :meth:`Rotations.describe` shows.
    """
    if recipe is None:
        return Rotations()
    generator = torch.Generator().manual_seed(seed)
    residual = RandomizedHadamard(_signs(sizes.hidden, generator), plan_hadamard(sizes.hidden))
    head = RandomizedHadamard(_signs(sizes.head_dim, generator), plan_hadamard(sizes.head_dim))
    head_shards = math.gcd(sizes.heads, recipe.shards)
    mixed_heads = sizes.heads // head_shards
    across = recipe.across_heads and mixed_heads > 1 and is_known_order(mixed_heads)
    sizes_of_r4 = (sizes.intermediate, *sizes.more_intermediate) if recipe.intermediate else ()
    plans = {size: plan_hadamard(size, shards=recipe.shards) for size in sizes_of_r4}
    r4 = {size: plan for size, plan in plans.items() if plan.block > 1}
    online = recipe.residual and not folds_residual and residual.plan.block > 1
    return Rotations(
        residual=residual if recipe.residual and folds_residual else None,
        residual_online=residual.plan if online else None,
        head=head if recipe.head else None,
        across_heads=plan_hadamard(sizes.heads, shards=head_shards) if across else None,
        intermediate=r4.pop(sizes.intermediate, None),
        more_intermediate=tuple(r4.values()),
        blocks=recipe.blocks,
    )
