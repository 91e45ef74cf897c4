"""How a product is carried out: plans as data, and which plan to use.

Tuned tables name plans by GPU model and shape; a rule serves where there is none. A table is JSON,
``{"linear_int8": {"<out>x<in>": {"<tokens>": plan}}}``. Tables for some GPUs ship in ``tuned/``; one that
``rrsq bench --tune`` wrote to the cache folder (``RRSQ_CACHE``, or ``~/.cache/rrsq``) comes before them. A
shape that is not in a table takes the plan of the nearest one. Nothing is ever tuned on its own.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import torch

from rrsq.errors import UsageError

__all__ = [
    "FusedPlan",
    "GemvPlan",
    "Plan",
    "Table",
    "TwoPassPlan",
    "cache_folder",
    "cache_path",
    "gpu_name",
    "plan_for",
    "plan_from_data",
    "plan_to_data",
    "reload_tables",
    "shipped_table",
]


@dataclass(frozen=True)
class GemvPlan:
    """:mod:`.gemv`: every product on the four-way dot unit; one token."""

    kind: ClassVar[str] = "gemv"
    chunks: int
    """Chunks of 32 packed bytes of a weight row taken in a step."""
    warps: int


@dataclass(frozen=True)
class FusedPlan:
    """:mod:`.packed_gemm`: weights unpacked in registers."""

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
    """:func:`~rrsq.kernels.weight_operand`, then an int8 product with the unpacked weight."""

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


Table = dict[str, dict[str, dict[str, object]]]
_SHIPPED = {"h200": "h200.json", "h100": "h100.json"}


def gpu_name(device: torch.device) -> str:
    """The GPU's model as a file name, ``nvidia-h200``; ``cpu`` elsewhere."""
    if device.type != "cuda":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def cache_folder() -> Path:
    """Where tuned tables are kept on this machine; it may not exist yet."""
    named = os.environ.get("RRSQ_CACHE")
    return Path(named or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "rrsq"))


def cache_path(device: torch.device) -> Path:
    """Where the tuned table of a device is kept on this machine."""
    return cache_folder() / f"kernels-{gpu_name(device)}.json"


def shipped_table(device: torch.device) -> str | None:
    """Name of the table that ships with rrsq for this GPU, or None."""
    name = gpu_name(device)
    return next((file for key, file in _SHIPPED.items() if key in name), None)


@functools.cache
def _tables(device: torch.device) -> tuple[Table, ...]:
    """Tables to ask in turn: the user's, then a shipped one."""
    tables = []
    path = cache_path(device)
    if path.is_file():
        tables.append(_read(path))
    shipped = shipped_table(device)
    if shipped is not None:
        source = resources.files(__package__) / "tuned" / shipped
        tables.append(json.loads(source.read_text())["linear_int8"])
    return tuple(tables)


def _read(path: Path) -> Table:
    try:
        table = json.loads(path.read_text())["linear_int8"]
        for plans in table.values():
            for data in plans.values():
                plan_from_data(data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"The tuned table {path} cannot be read ({error!r}). Delete it or tune again."
        ) from error
    return table


def reload_tables() -> None:
    """Forget tables and plans, so that a table just written is read."""
    _tables.cache_clear()
    plan_for.cache_clear()


def _distance(shape: str, out_features: int, in_features: int) -> float:
    out, inner = (int(part) for part in shape.split("x"))
    return abs(math.log(out / out_features)) + abs(math.log(inner / in_features))


@functools.lru_cache(maxsize=4096)
def plan_for(
    tokens: int, out_features: int, in_features: int, packed_words: bool, device: torch.device
) -> Plan:
    """The plan of a product.

    Args:
        tokens: rows of the operand.
        out_features: rows of the weight.
        in_features: columns of the weight.
        packed_words: whether kernels that unpack in registers can serve it.
        device: where it runs.
    """
    for table in _tables(device):
        if table:
            plans = table[min(table, key=lambda shape: _distance(shape, out_features, in_features))]
            bucket = min((int(t) for t in plans if int(t) >= tokens), default=max(int(t) for t in plans))
            plan = plan_from_data(plans[str(bucket)])
            if packed_words or isinstance(plan, TwoPassPlan):
                return _fitting(plan, tokens)
    return _default(tokens, out_features, packed_words)


def _fitting(plan: Plan, tokens: int) -> Plan:
    """Guard against a table whose largest GEMV bucket is exceeded."""
    if isinstance(plan, GemvPlan) and tokens > 1:
        return FusedPlan(16, 64, 128, 4, 4, 4)
    return plan


def _default(tokens: int, out_features: int, packed_words: bool) -> Plan:
    """Plans of moderate size, which need less than 64 KiB of shared memory."""
    if packed_words and tokens == 1:
        return GemvPlan(chunks=32, warps=2)
    if packed_words and tokens <= 256:
        block_tokens = min(max(1 << (tokens - 1).bit_length(), 16), 64)
        split = 1 if tokens > 64 else 4 if out_features <= 8192 else 2
        return FusedPlan(block_tokens, 64, 128 if block_tokens == 16 else 64, split, 4, 4)
    return TwoPassPlan(128, 128, 64, 16, 4, 3, False)
