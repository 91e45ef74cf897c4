"""Whether the parts of a checkpoint's ``config.json`` go together, before a model is built by it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...errors import CheckpointError
from ...models import ModelFamily, ModelSizes, family_for
from ..rotation.rotations import make_rotations
from .config_file import check_sizes, numbers
from .format import CheckpointInfo

__all__ = ["check_description"]

_DTYPES = ("float32", "float16", "bfloat16", "float64", "None")
_KEY_BITS = (4, 8)


def check_description(config: Any, info: CheckpointInfo) -> None:
    """Refuse a checkpoint whose parts of ``config.json`` contradict each other.

    Args:
        config: configuration of transformers.
        info: the ``quantization_config``.

    Raises:
        CheckpointError: a size, a rotation or the key bits do not go with each other.
        UnsupportedArchitectureError: no family is known for the model.
    """
    check_sizes(vars(config), "config.json")
    for key, value in numbers(vars(config)):
        if isinstance(value, float) and not math.isfinite(value):
            raise CheckpointError(f"config.json of the checkpoint has the value {value} for '{key}'.")
    dtype = str(getattr(config, "dtype", None)).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise CheckpointError(f"config.json of the checkpoint asks for dtype {dtype!r:.100}.")
    family = family_for(config)
    sizes = _sizes(config, family)
    _check_rotations(info, family, sizes)
    bits = info.key_bits
    if any(entry not in _KEY_BITS for entry in bits):
        raise CheckpointError("quantization_config of the checkpoint has key_bits other than 4 and 8.")
    if len(bits) != (0 if info.recipe.kv_cache is None else sizes.layers):
        raise CheckpointError(
            f"quantization_config of the checkpoint has key_bits for {len(bits)} layers, and its recipe and"
            f" config.json ask for {0 if info.recipe.kv_cache is None else sizes.layers}."
        )


def _sizes(config: Any, family: ModelFamily) -> ModelSizes:
    try:
        sizes = family.sizes(config)
        for name, size in vars(sizes).items():
            if name != "more_intermediate" and (type(size) is not int or size < 1):
                raise ValueError(f"'{name}' is {size!r:.50}")
    except Exception as error:
        raise CheckpointError(f"config.json of the checkpoint has no valid sizes: {error}.") from error
    return sizes


def _check_rotations(info: CheckpointInfo, family: ModelFamily, sizes: ModelSizes) -> None:
    """The rotations must be those that the recipe gives a model of these sizes; their blocks may differ."""
    rotations = make_rotations(info.recipe.rotation, sizes, 0, folds_residual=family.folds_residual)
    expected, found = rotations.describe(), info.rotation.model_dump()
    for name, plan in expected.items():
        if _plan_sizes(found[name]) != _plan_sizes(plan):
            raise CheckpointError(
                f"The checkpoint describes a rotation '{name}' of size {_plan_sizes(found[name])}; its recipe"
                f" and config.json ask for {_plan_sizes(plan)}."
            )


def _plan_sizes(plans: Any) -> Any:
    """The size of a plan, those of several, or None."""
    if plans is None:
        return None
    return plans["size"] if isinstance(plans, Mapping) else [plan["size"] for plan in plans]
