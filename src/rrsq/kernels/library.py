"""The operations as ``torch.library`` ops, so that ``torch.compile`` and CUDA graphs capture them whole.

Every op takes tensors and plain scalars, synchronizes with nothing, and asks the dispatch (:mod:`.dispatch`)
for its implementation when it runs, so :func:`~rrsq.kernels.dispatch.use_kernels` also governs compiled code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import fake, registry
from .dispatch import Call, resolve

__all__ = ["rotation_sizes", "weight_sizes"]

Sizes = tuple[tuple[str, int], ...]
"""Names and values that a kernel may constrain."""


@dataclass(frozen=True)
class _Operation:
    """What the dispatch needs to know of an operation.

    Attributes:
        schema: its arguments and results, as ``torch.library`` reads them.
        dtypes: names of arguments whose dtype a kernel may constrain.
        sizes: of the first argument and all arguments by name.
    """

    schema: str
    dtypes: tuple[str, ...]
    sizes: Callable[[Tensor, dict[str, Any]], Sizes]


def rotation_sizes(channels: int, base: Tensor | None, hadamard_block: int, inner: int) -> Sizes:
    """The sizes of a rotation that a kernel may constrain; nothing when there is no rotation.

    ``hadamard_rows`` and ``hadamard_columns``: a token seen as rows that need a dense product and contiguous
    columns that Sylvester's matrix mixes (``inner`` > 1: that are not mixed).
    """
    if base is None:
        return ()
    columns = hadamard_block // base.shape[0] if inner == 1 else inner
    return ("hadamard_rows", channels // columns), ("hadamard_columns", columns)


def weight_sizes(tokens: int, packed: Tensor, multiplier: Tensor | None) -> Sizes:
    """The sizes of a linear, or of all experts' linears, that a kernel may constrain."""
    in_features = 2 * packed.shape[-1]
    sizes = (("tokens", tokens), ("in_features", in_features), ("out_features", packed.shape[-2]))
    return (
        sizes if multiplier is None else (*sizes, ("weight_group_size", in_features // multiplier.shape[-1]))
    )


def _of_rotation(x: Tensor, named: dict[str, Any]) -> Sizes:
    rotation = rotation_sizes(x.shape[-1], named["base"], named["hadamard_block"], named["inner"])
    return ("channels", x.shape[-1]), *rotation


def _of_activations(x: Tensor, named: dict[str, Any]) -> Sizes:
    group = () if named["group_size"] is None else (("group_size", named["group_size"]),)
    rotation = rotation_sizes(x.shape[1], named["base"], named["hadamard_block"], named["hadamard_inner"])
    return ("channels", x.shape[1]), *group, *rotation


def _of_linear(operand: Tensor, named: dict[str, Any]) -> Sizes:
    return weight_sizes(operand.shape[0], named["weight_packed"], named["weight_multiplier"])


def _of_scaled_groups(codes: Tensor, named: dict[str, Any]) -> Sizes:
    return *_of_linear(codes, named), ("group_size", codes.shape[1] // named["group_scale"].shape[1])


def _of_experts(operand: Tensor, named: dict[str, Any]) -> Sizes:
    groups = named["group_scale"]
    group = () if groups is None else (("group_size", operand.shape[1] // groups.shape[1]),)
    rows = named["experts"].shape[0]
    return *weight_sizes(rows, named["weight_packed"], named["weight_multiplier"]), *group


_OPERATIONS = {
    "hadamard_transform": _Operation(
        "(Tensor x, Tensor base, int hadamard_block, int inner) -> Tensor", ("x",), _of_rotation
    ),
    "quantize_folded": _Operation(
        "(Tensor x, int bits, int? group_size, float clip, Tensor? base, int hadamard_block, "
        "int hadamard_inner) -> (Tensor, Tensor)",
        ("x",),
        _of_activations,
    ),
    "quantize_smoothed": _Operation(
        "(Tensor x, int bits, int group_size, str scope, str statistic, float clip, Tensor? channel_order, "
        "Tensor? base, int hadamard_block, int hadamard_inner) -> (Tensor, Tensor, Tensor)",
        ("x",),
        _of_activations,
    ),
    "linear_folded": _Operation(
        "(Tensor operand, Tensor scale, Tensor weight_packed, Tensor weight_scale, "
        "Tensor? weight_multiplier, Tensor? bias, ScalarType out_dtype, Tensor? unpacked) -> Tensor",
        ("out_dtype",),
        _of_linear,
    ),
    "linear_group_scaled": _Operation(
        "(Tensor codes, Tensor scale, Tensor group_scale, int tokens_per_set, Tensor weight_packed, "
        "Tensor weight_scale, Tensor? weight_multiplier, Tensor? bias, ScalarType out_dtype, "
        "Tensor? unpacked) -> Tensor",
        ("out_dtype",),
        _of_scaled_groups,
    ),
    "linear_weight_only": _Operation(
        "(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor? weight_multiplier, Tensor? bias, "
        "Tensor? unpacked) -> Tensor",
        ("x",),
        _of_linear,
    ),
    "grouped_linear": _Operation(
        "(Tensor operand, Tensor? scale, Tensor? group_scale, int tokens_per_set, Tensor experts, "
        "Tensor order, Tensor start, Tensor ends, Tensor blocks, int block_rows, int rows_per_token, "
        "Tensor weight_packed, Tensor weight_scale, Tensor? weight_multiplier, ScalarType out_dtype, "
        "Tensor? unpacked) -> Tensor",
        ("operand", "out_dtype"),
        _of_experts,
    ),
}


def _dtype(value: Tensor | torch.dtype) -> torch.dtype:
    return value.dtype if isinstance(value, Tensor) else value


def _implementation(name: str, operation: _Operation) -> Callable[..., Any]:
    """What an op runs: the kernel that the dispatch names for its arguments."""
    names = [argument.name for argument in getattr(torch.ops.rrsq, name).default._schema.arguments]

    def run(*values: Any) -> Any:
        named = dict(zip(names, values, strict=True))
        first = values[0]
        dtypes = tuple((key, _dtype(named[key])) for key in operation.dtypes)
        kernel = resolve(Call(name, first.device, dtypes, operation.sizes(first, named)))
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):  # Triton launches on the current one.
                return kernel(*values)
        return kernel(*values)

    return run


_library = torch.library.Library("rrsq", "FRAGMENT")
for _name in registry.OPERATIONS:
    _library.define(f"{_name}{_OPERATIONS[_name].schema}")
    _library.impl(_name, _implementation(_name, _OPERATIONS[_name]), "CompositeExplicitAutograd")
    torch.library.register_fake(f"rrsq::{_name}", getattr(fake, _name), lib=_library)
