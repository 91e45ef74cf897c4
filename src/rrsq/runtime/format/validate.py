"""What is checked of a checkpoint, since kernels would make wrong text of wrong numbers without a word.

Its description is checked before a model is built by it; the names, shapes and dtypes of its tensors before
they are loaded; and their numbers after that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CheckpointError
from ...kernels.packing import MULTIPLIER_MAX
from ...models import ModelFamily, ModelSizes, family_for
from ..rotation.rotations import make_rotations
from .format import CheckpointInfo
from .json_files import check_sizes, numbers
from .shards import DTYPES, merge_headers, read_shards

__all__ = ["check_description", "check_layers", "check_shards", "check_value", "check_values"]

_MODEL_DTYPES = ("float32", "float16", "bfloat16", "float64", "None")
_KEY_BITS = (4, 8)
_FLOATS = ("F64", "F32", "F16", "BF16")


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
    if dtype not in _MODEL_DTYPES:
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
    """The size of a plan, those of several, or None; a size is itself."""
    if plans is None or isinstance(plans, int):
        return plans
    return plans["size"] if isinstance(plans, Mapping) else [plan["size"] for plan in plans]


def check_layers(folder: Path, layers: int) -> None:
    """Refuse a folder that cannot hold the layers its configuration asks for, before any is built.

    Raises:
        CheckpointError: there are fewer tensors than layers, or as in :func:`read_shards`.
    """
    tensors = len(read_shards(folder))
    if layers > tensors:
        raise CheckpointError(
            f"The config.json of '{folder}' asks for {layers} layers, and the folder holds {tensors} tensors"
            " in all. A shard may not have been copied."
        )


def check_shards(model: nn.Module, files: Iterable[str]) -> None:
    """Compare what the shards hold with what a model expects.

    Args:
        model: assembled, its tensors may be on the meta device.
        files: paths of the safetensors shards; nothing is checked if there are none.

    Raises:
        CheckpointError: a shard is damaged or no safetensors file, or a tensor is missing, unknown to the
            model, or of another shape or kind of dtype.
    """
    paths = [Path(file) for file in files]
    if not paths:
        return
    for path in paths:
        if path.suffix != ".safetensors":
            raise CheckpointError(f"'{path}' is no safetensors file; pickled weights are never loaded.")
    found = merge_headers(paths)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    expected = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    missing = sorted(expected.keys() - found.keys())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"The checkpoint lacks the tensor '{missing[0]}'{more}. A shard may not have been copied."
        )
    unknown = sorted(found.keys() - expected.keys() - set(tied))
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise CheckpointError(
            f"The checkpoint holds the tensor '{unknown[0]:.200}'{more}, for which its config.json and recipe"
            " have no use: they belong to another checkpoint, or were changed."
        )
    for name, tensor in expected.items():
        shape, dtype = found[name].shape, found[name].dtype
        if shape != tuple(tensor.shape):
            raise CheckpointError(
                f"Tensor '{name}' of the checkpoint has shape {list(shape)}; its recipe needs"
                f" {list(tensor.shape)}."
            )
        # A float may be of another precision than the model is loaded in; an integer is what it is.
        fits = dtype in _FLOATS if tensor.is_floating_point() else DTYPES.get(dtype) == tensor.dtype
        if not fits:
            raise CheckpointError(f"Tensor '{name}' of the checkpoint has dtype {dtype}, not {tensor.dtype}.")


def check_values(model: nn.Module) -> None:
    """Refuse tensors that hold what no quantization makes.

    Tensors on the meta device (offloaded ones) are passed over.

    Raises:
        CheckpointError: a number is NaN or infinite, a scale is not positive, a multiplier is zero or beyond
            ±15, a channel order is no permutation, or a sign is not ±1.
    """
    for name, tensor in model.state_dict().items():
        check_value(name, tensor)


def check_value(name: str, tensor: Tensor) -> None:
    """The same of one tensor, by its name in the checkpoint."""
    if tensor.is_meta or not tensor.numel():
        return
    leaf = name.rsplit(".", 1)[-1]
    holds, what = _RULES.get(leaf, (_finite, "NaN or Inf"))
    if not bool(holds(tensor)):
        raise CheckpointError(
            f"Tensor '{name}' of the checkpoint holds {what}. Copy the checkpoint again, or quantize the"
            " model again."
        )


def _finite(tensor: Tensor) -> Any:
    if not tensor.is_floating_point():
        return True
    least, most = torch.aminmax(tensor)  # Without a copy of the tensor; NaN is handed on.
    return torch.isfinite(least) & torch.isfinite(most)


def _positive(tensor: Tensor) -> Any:
    least, most = torch.aminmax(tensor)
    return (least > 0) & torch.isfinite(most)


def _multiplier(tensor: Tensor) -> Any:
    least, most = torch.aminmax(tensor)
    # The dtype says whether there may be a sign.
    within = (least.int() >= -MULTIPLIER_MAX) & (most.int() <= MULTIPLIER_MAX)
    return within & (tensor != 0).all()


def _permutation(tensor: Tensor) -> Any:
    return (tensor.sort().values == torch.arange(tensor.numel(), device=tensor.device)).all()


def _signs(tensor: Tensor) -> Any:
    return (tensor.abs() == 1).all()


_RULES: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "weight_scale": (_positive, "a scale that is not a positive finite number"),
    "weight_multiplier": (_multiplier, f"a multiplier that is zero or beyond ±{MULTIPLIER_MAX}"),
    "channel_order": (_permutation, "an order of channels that is no permutation"),
    "residual_signs": (_signs, "a sign that is neither 1 nor -1"),
    "head_signs": (_signs, "a sign that is neither 1 nor -1"),
}
