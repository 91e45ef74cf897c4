"""``rrsq models``: the model families, their rotations and the sizes they are rotated in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from rrsq.cli.console import examples
from rrsq.cli.tables import Rows, show_rows

if TYPE_CHECKING:
    from rrsq.models import ModelFamily, ModelSizes

__all__ = ["EXAMPLES", "families_table", "models", "sizes_table"]

EXAMPLES = examples("rrsq models", "rrsq models --markdown")


def models(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print both tables as Markdown, as docs/models.md has them.")
    ] = False,
) -> None:
    """List the model families that can be quantized, and how public models of them are rotated."""
    for rows in (families_table(), sizes_table()):
        show_rows(rows, markdown=markdown)


def families_table() -> Rows:
    """A header and one row a family: what R1, R2, the rotation across heads and R4 are there."""
    from rrsq.models import families

    header = ("family", "architecture", "R1", "R2", "across heads", "R4", "tested on")
    return [header, *(_family_row(family) for family in families())]


def sizes_table() -> Rows:
    """A header and one row a public model: the Hadamard matrices its sizes are rotated by."""
    from rrsq.models import families

    header = ("family", "model", "hidden (R1)", "head_dim (R2)", "heads", "intermediate (R4)")
    rows = [
        (family.model_type, name, *_orders(sizes))
        for family in families()
        for name, sizes in family.public.items()
    ]
    return [header, *rows]


def _family_row(family: ModelFamily) -> tuple[str, ...]:
    residual = "folded" if family.folds_residual else "online, at qkv and gate_up"
    tested = ", ".join(("random weights", *family.tested_on))
    return family.model_type, family.architecture, residual, "folded", "online", "online", tested


def _orders(sizes: ModelSizes) -> tuple[str, ...]:
    from rrsq.runtime.rotation.hadamard import is_known_order

    heads = _order(sizes.heads) if is_known_order(sizes.heads) else f"{sizes.heads}: none"
    intermediate = ", ".join(_order(size) for size in (sizes.intermediate, *sizes.more_intermediate))
    return _order(sizes.hidden), _order(sizes.head_dim), heads, intermediate


def _order(size: int) -> str:
    """Such as ``14336 = 28·512`` (28 times Sylvester's 512) or ``29568 = 7 blocks of 132·32``."""
    from rrsq.runtime.rotation.hadamard import plan_hadamard

    plan = plan_hadamard(size)
    factors = f"{plan.base}·{plan.power}" if plan.base > 1 else f"{plan.power}"
    if not plan.is_full:
        return f"{size} = {size // plan.block} blocks of {factors}"
    return f"{size}" if plan.base == 1 else f"{size} = {factors}"
