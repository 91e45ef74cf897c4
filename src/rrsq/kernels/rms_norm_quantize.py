"""RMSNorm (arXiv 1910.07467), with the residual addition before it if wanted, into quantization: one pass.

What is normalized is never written: a decoder layer's linears read it as integers only.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False, disable-error-code="assignment,misc"
# ruff: noqa: RUF005 - Triton knows no starred elements of tuples.

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._triton import COMPILED, tl, triton
from .codes import code_max, rounded_to
from .operation import Constraints, operation
from .quantize_signed import (
    SIGNED_MAX,
    cut_of,
    load_units,
    quantize_signed,
    rotated_units,
    store_quantized,
    store_units,
    unit_of,
)
from .rms_norm import rms_norm

__all__ = ["add_rms_norm_quantize", "rms_norm_quantize"]


def _sizes(x: Tensor, bits: int, group_size: int | None, block: int) -> tuple[tuple[str, int], ...]:
    sizes = ("channels", x.shape[-1]), ("hadamard_block", block)
    return sizes if group_size is None else (*sizes, ("group_size", group_size))


def _norm_sizes(
    x: Tensor, weight: Tensor, eps: float, offset: float, late: bool, *quantization: Any
) -> tuple[tuple[str, int], ...]:
    return _sizes(x, *quantization)


def _add_norm_sizes(x: Tensor, residual: Tensor, *others: Any) -> tuple[tuple[str, int], ...]:
    return _norm_sizes(x, *others)


def _fake(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


def _add_fake(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return *_fake(x), x.new_empty(x.shape)


_TYPICAL: dict[str, int | torch.dtype] = {
    "x": torch.bfloat16,
    "weight": torch.bfloat16,
    "channels": 4096,
    "hadamard_block": 16,
    "group_size": 16,
}


@operation(fake=_fake, sizes=_norm_sizes, dtypes=("x", "weight"), typical=_TYPICAL, activations=2, rows=True)
def rms_norm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    late: bool,
    bits: int,
    group_size: int | None,
    block: int,
) -> tuple[Tensor, Tensor]:
    """``quantize_signed(rms_norm(x))``, with what is normalized rounded to the dtype of ``x`` in between.

    The kernel quantizes to the bit as :func:`quantize_signed` does. The mean square is a sum in float32,
    whose order is the implementation's own: with it, now and then the last bit of what is normalized.

    Args:
        x: floating point ``[tokens, channels]``.
        weight: ``[channels]`` of the same dtype.
        eps, offset, late: see :func:`rms_norm`.
        bits, group_size, block: see :func:`quantize_signed`.

    Returns:
        ``operand`` int8 ``[tokens, channels]`` and ``scale`` float32 ``[tokens]``, see
        :func:`quantize_signed`.
    """
    normed = rms_norm.reference(x, weight, eps, offset, late)
    return quantize_signed.reference(normed, bits, group_size, block)


@operation(
    fake=_add_fake,
    sizes=_add_norm_sizes,
    dtypes=("x", "residual", "weight"),
    typical={**_TYPICAL, "residual": torch.bfloat16},
    activations=3,
    rows=True,
)
def add_rms_norm_quantize(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    late: bool,
    bits: int,
    group_size: int | None,
    block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`rms_norm_quantize` of ``residual + x``, which is rounded to their dtype first.

    Args:
        x, residual: floating point ``[tokens, channels]``, of one dtype.
        weight, eps, offset, late, bits, group_size, block: see :func:`rms_norm_quantize`.

    Returns:
        ``operand``, ``scale`` and the sum ``[tokens, channels]`` in the dtype of ``x``.
    """
    total = residual + x
    return *rms_norm_quantize.reference(total, weight, eps, offset, late, bits, group_size, block), total


@triton.jit
def _kernel(
    x_pointer,
    residual_pointer,
    weight_pointer,
    total_pointer,
    operand_pointer,
    scale_pointer,
    channels,
    eps,
    offset,
    scale_factor,
    normalization,
    ADD: tl.constexpr,
    LATE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    UNITS: tl.constexpr,
    PARTS: tl.constexpr,
    PIECE: tl.constexpr,
    PTX: tl.constexpr,
):
    """One token, all in registers; see ``_quantize_kernel`` of :mod:`.quantize_signed`."""
    DTYPE: tl.constexpr = x_pointer.dtype.element_ty
    token = tl.program_id(0)
    start = token.to(tl.int64) * channels
    units = channels // UNIT
    unit = tl.arange(0, UNITS)
    squares = tl.zeros([UNITS], tl.float32)
    values = ()
    for part in tl.static_range(PARTS):
        x = load_units(x_pointer + start, unit + part * UNITS, units, PIECE, UNIT)
        if ADD:
            other = load_units(residual_pointer + start, unit + part * UNITS, units, PIECE, UNIT)
            total = ()
            for i in tl.static_range(UNIT):
                total = total + (rounded_to(other[i] + x[i], DTYPE, PTX),)
            x = total
            store_units(total_pointer + start, unit + part * UNITS, units, x, PIECE, UNIT)
        for i in tl.static_range(UNIT):
            squares += x[i] * x[i]
        values = values + (x,)
    factor = tl.rsqrt(tl.sum(squares, 0) / channels + eps)
    parts = ()
    for part in tl.static_range(PARTS):
        x = values[part]
        weight = load_units(weight_pointer, unit + part * UNITS, units, PIECE, UNIT)
        y = ()
        for i in tl.static_range(UNIT):
            if LATE:
                y = y + (rounded_to(x[i] * factor * (offset + weight[i]), DTYPE, PTX),)
            else:
                gain = rounded_to(offset + weight[i], DTYPE, PTX)
                y = y + (rounded_to(gain * rounded_to(x[i] * factor, DTYPE, PTX), DTYPE, PTX),)
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


def _launcher(
    x: Tensor, add: bool, eps: float, offset: float, late: bool, bits: int, group_size: int | None, block: int
) -> Callable[[Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """What is the same for tokens like these is looked up once; the third result is the sum, or ``x``."""
    channels, device = x.shape[-1], x.device
    unit = unit_of(channels, group_size, block)
    cut = cut_of(x.numel() // channels, channels, unit)
    units, parts, warps = cut.units, cut.parts, cut.warps
    scale_factor = 1.0 / (code_max(bits) if group_size is None else 7 * SIGNED_MAX)
    normalization, group, piece = 1.0 / math.sqrt(block), group_size or 0, min(16 // x.element_size(), unit)

    def run(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x.contiguous()
        tokens = x.numel() // channels
        total = torch.empty_like(x) if add else x
        operand = torch.empty_like(x, dtype=torch.int8)
        scale = torch.empty(tokens, dtype=torch.float32, device=device)
        if tokens:
            _kernel[(tokens,)](
                x,
                x if residual is None else residual.contiguous(),
                weight,
                total,
                operand,
                scale,
                channels,
                eps,
                offset,
                scale_factor,
                normalization,
                add,
                late,
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
        return operand, scale, total

    return run


_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32})


def _constraints(*dtypes: str) -> Constraints:
    return Constraints.on_gpu(
        dtypes=dict.fromkeys(dtypes, _FLOATS),
        divisible={"channels": 4},
        at_least={"group_size": 4},
        at_most={"hadamard_block": 64, "group_size": 64, "channels": 32768},
        power_of_two=frozenset({"hadamard_block", "group_size"}),
    )


def _prepare(x: Tensor, weight: Tensor, *others: Any) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """See :meth:`~rrsq.kernels.operation.Operation.prepare`."""
    run = _launcher(x, False, *others)
    return lambda x, weight: run(x, None, weight)[:2]


@rms_norm_quantize.kernel("triton", _constraints("x", "weight"))
def _launch(x: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return _prepare(x, weight, *others)(x, weight)


_launch.prepare = _prepare  # type: ignore[attr-defined]


def _add_prepare(
    x: Tensor, residual: Tensor, weight: Tensor, *others: Any
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """The same of :func:`add_rms_norm_quantize`."""
    return _launcher(x, True, *others)


@add_rms_norm_quantize.kernel("triton", _constraints("x", "residual", "weight"))
def _add_launch(x: Tensor, residual: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _add_prepare(x, residual, weight, *others)(x, residual, weight)


_add_launch.prepare = _add_prepare  # type: ignore[attr-defined]
