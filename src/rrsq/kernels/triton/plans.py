"""How a product is carried out, as data: which kernel, with which tile sizes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

__all__ = ["FusedPlan", "GemvPlan", "Plan", "TwoPassPlan", "plan_from_data", "plan_to_data"]


@dataclass(frozen=True)
class GemvPlan:
    """:mod:`.gemv_kernel`: every product on the four-way dot unit; one token."""

    kind: ClassVar[str] = "gemv"
    chunks: int
    """Chunks of 32 packed bytes of a weight row taken in a step."""
    warps: int


@dataclass(frozen=True)
class FusedPlan:
    """:mod:`.packed_gemm_kernel`: weights unpacked in registers."""

    kind: ClassVar[str] = "fused"
    block_tokens: int
    block_out: int
    block_bytes: int
    """Packed bytes of a weight row taken in a step."""
    split: int
    """Programs that share the sum over K of one tile."""
    warps: int
    stages: int


@dataclass(frozen=True)
class TwoPassPlan:
    """:mod:`.unpack_kernel`, then :mod:`.int8_gemm_kernel` on the unpacked weight."""

    kind: ClassVar[str] = "two_pass"
    block_tokens: int
    block_out: int
    block_in: int
    group_tiles: int
    """Rows of tiles in a band that is walked column by column, for the L2."""
    warps: int
    stages: int
    descriptors: bool
    """Whether operands are loaded by the tensor memory accelerator."""


Plan = GemvPlan | FusedPlan | TwoPassPlan
_KINDS: dict[str, type[Plan]] = {plan.kind: plan for plan in (GemvPlan, FusedPlan, TwoPassPlan)}


def plan_to_data(plan: Plan) -> dict[str, Any]:
    """The JSON form of a plan."""
    return {"kind": plan.kind, **asdict(plan)}


def plan_from_data(data: dict[str, Any]) -> Plan:
    """A plan from its JSON form.

    Raises:
        KeyError: the kind of plan is unknown.
        TypeError: its fields are not those of its kind.
    """
    fields = dict(data)
    return _KINDS[fields.pop("kind")](**fields)
