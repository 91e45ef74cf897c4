"""The gate of an MLP into quantization, in one pass: activation, multiplication, rotation, codes."""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False, disable-error-code="assignment,misc"
# ruff: noqa: RUF005 - Triton knows no starred elements of tuples.

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._triton import COMPILED, ceil_div, libdevice, tl, triton
from .codes import code_max, rounded_to
from .operation import Constraints, operation
from .quantize_signed import (
    SIGNED_MAX,
    Cut,
    cut_of,
    load_units,
    quantize_signed,
    rotated_units,
    store_quantized,
    unit_of,
)

__all__ = ["GATES", "gated_quantize"]

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}
"""Activations of a gate, by name."""
_SCALE = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
_CUBIC = tl.constexpr(0.044715)


def _fake(gate_up: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    tokens, channels = gate_up.shape
    return (
        gate_up.new_empty((tokens, channels // 2), dtype=torch.int8),
        gate_up.new_empty(tokens, dtype=torch.float32),
    )


def _sizes(
    gate_up: Tensor, activation: str, bits: int, group_size: int | None, block: int
) -> tuple[tuple[str, int], ...]:
    sizes = ("channels", gate_up.shape[1] // 2), ("hadamard_block", block)
    return sizes if group_size is None else (*sizes, ("group_size", group_size))


@operation(
    fake=_fake,
    sizes=_sizes,
    dtypes=("gate_up",),
    typical={"gate_up": torch.bfloat16, "channels": 14336, "hadamard_block": 16, "group_size": 16},
    rows=True,
)
def gated_quantize(
    gate_up: Tensor, activation: str, bits: int, group_size: int | None, block: int
) -> tuple[Tensor, Tensor]:
    """``quantize_signed(activation(gate) * up)``, both factors and the product rounded to their dtype.

    The kernel computes an activation in float32, by torch's formula, with a division that may be off by two
    units in the last place of float32: now and then the last bit of a 16-bit activation is another one. What
    follows is to the bit what :func:`quantize_signed` does.

    Args:
        gate_up: floating point ``[tokens, 2 * channels]``, the gates first.
        activation: a name in :data:`GATES`.
        bits, group_size, block: see :func:`quantize_signed`.

    Returns:
        ``operand`` int8 ``[tokens, channels]`` and ``scale`` float32 ``[tokens]``, see
        :func:`quantize_signed`.
    """
    gate, up = gate_up.chunk(2, dim=1)
    return quantize_signed.reference(GATES[activation](gate) * up, bits, group_size, block)


@triton.jit
def _exp(x, PTX: tl.constexpr):
    if PTX:
        return libdevice.exp(x)
    else:
        return tl.exp(x)


@triton.jit
def _tanh(x, PTX: tl.constexpr):
    if PTX:
        return libdevice.tanh(x)
    else:
        return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _gate(x, ACTIVATION: tl.constexpr, PTX: tl.constexpr):
    """The activation of float32 ``x``."""
    if ACTIVATION == "silu":
        return x / (1.0 + _exp(-x, PTX))
    else:
        cube = x * x * x
        if PTX:
            inner = tl.fma(tl.full(x.shape, _CUBIC, tl.float32), cube, x)  # As CUDA's compiler fuses it.
        else:
            inner = x + cube * _CUBIC
        return 0.5 * x * (1.0 + _tanh(inner * _SCALE, PTX))


@triton.jit
def _kernel(
    gate_up_pointer,
    operand_pointer,
    scale_pointer,
    channels,
    scale_factor,
    normalization,
    ACTIVATION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    UNITS: tl.constexpr,
    PARTS: tl.constexpr,
    PIECE: tl.constexpr,
    PTX: tl.constexpr,
):
    """One token, all in registers; see ``_quantize_kernel`` of :mod:`.quantize_signed`."""
    DTYPE: tl.constexpr = gate_up_pointer.dtype.element_ty
    token = tl.program_id(0)
    start = token.to(tl.int64) * channels
    units = channels // UNIT
    unit = tl.arange(0, UNITS)
    row = gate_up_pointer + 2 * start
    parts = ()
    for part in tl.static_range(PARTS):
        gate = load_units(row, unit + part * UNITS, units, PIECE, UNIT)
        up = load_units(row + channels, unit + part * UNITS, units, PIECE, UNIT)
        y = ()
        for i in tl.static_range(UNIT):
            y = y + (rounded_to(rounded_to(_gate(gate[i], ACTIVATION, PTX), DTYPE, PTX) * up[i], DTYPE, PTX),)
        parts = parts + (rotated_units(y, UNIT, BLOCK),)
    store_quantized(
        parts,
        operand_pointer + start,
        scale_pointer + token,
        unit,
        units,
        scale_factor,
        normalization,
        GROUP,
        BLOCK,
        UNIT,
        UNITS,
        PARTS,
        PTX,
    )


def _cut(tokens: int, channels: int, unit: int) -> Cut:
    """Two units a thread where tokens are many: two tensors of more would not fit into registers."""
    cut = cut_of(tokens, channels, unit)
    while cut.parts > 1 and cut.warps < 16:
        cut = Cut(2 * cut.units, ceil_div(channels, 2 * unit * cut.units), 2 * cut.warps)
    return cut


def _prepare(
    gate_up: Tensor, activation: str, bits: int, group_size: int | None, block: int
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """See :meth:`~rrsq.kernels.operation.Operation.prepare`."""
    columns, device = gate_up.shape[-1], gate_up.device
    channels = columns // 2
    unit = unit_of(channels, group_size, block)
    cut = _cut(gate_up.numel() // columns, channels, unit)
    units, parts, warps = cut.units, cut.parts, cut.warps
    scale_factor = 1.0 / (code_max(bits) if group_size is None else 7 * SIGNED_MAX)
    normalization, group = 1.0 / math.sqrt(block), group_size or 0
    piece = min(16 // gate_up.element_size(), unit)

    def run(gate_up: Tensor) -> tuple[Tensor, Tensor]:
        gate_up = gate_up.contiguous()
        tokens = gate_up.numel() // columns
        operand = torch.empty(*gate_up.shape[:-1], channels, dtype=torch.int8, device=device)
        scale = torch.empty(tokens, dtype=torch.float32, device=device)
        if tokens:
            _kernel[(tokens,)](
                gate_up,
                operand,
                scale,
                channels,
                scale_factor,
                normalization,
                activation,
                group,
                block,
                unit,
                units,
                parts,
                piece,
                COMPILED,
                enable_fp_fusion=False,
                num_warps=warps,
            )
        return operand, scale

    return run


@gated_quantize.kernel(
    "triton",
    Constraints.on_gpu(
        dtypes={"gate_up": frozenset({torch.float16, torch.bfloat16, torch.float32})},
        divisible={"channels": 4},
        at_least={"group_size": 4},
        at_most={"hadamard_block": 64, "group_size": 64, "channels": 65536},
        power_of_two=frozenset({"hadamard_block", "group_size"}),
    ),
)
def _launch(gate_up: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return _prepare(gate_up, *others)(gate_up)


_launch.prepare = _prepare  # type: ignore[attr-defined]
