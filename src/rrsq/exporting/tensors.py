"""The tensors of a linear as compressed-tensors stores them.

What a scheme stands for is ``weight[n, k] = scale[n, k // g] * (code[n, k] - zero[n, k // g])``. Packed codes
are offset-binary: eight 4-bit (or four 8-bit) ones in an int32, the first in its lowest bits; weights are
packed along the channels, zero points along the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ExportError
from ..kernels.packing import unpack_int4
from .schemes import LinearScheme

__all__ = ["ExportedLinear", "export_linear", "pack_words", "planned_linear", "rounded"]

# Of a scale, by rounding it: what bfloat16 does to a number at most. More is an underflow.
_LARGEST_ERROR = 2.0**-8


@dataclass(frozen=True)
class ExportedLinear:
    """The tensors of a linear, by the last part of their names, and what rounding the scales cost.

    Attributes:
        tensors: see :func:`planned_linear`.
        scale_error: largest relative error of a scale that counts.
    """

    tensors: dict[str, Tensor]
    scale_error: float


def planned_linear(
    scheme: LinearScheme, out_features: int, in_features: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Empty tensors of a linear, by the last part of their names.

    ``weight_packed`` int32 ``[out, in * bits / 32]``, ``weight_scale`` ``[out, groups]`` of ``dtype``,
    ``weight_shape`` int64 ``[2]`` and, with zero points, ``weight_zero_point`` int32 ``[out * bits / 32,
    groups]``. With an int8 input: ``weight`` int8 ``[out, in]`` and ``weight_scale`` float32 ``[out, 1]``.
    """
    groups = 1 if scheme.group_size is None else in_features // scheme.group_size

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    if scheme.int8_input:
        return {
            "weight": empty(out_features, in_features, dtype=torch.int8),
            "weight_scale": empty(out_features, 1, dtype=torch.float32),
        }
    words = _words(in_features, scheme.bits)
    tensors = {
        "weight_packed": empty(out_features, words, dtype=torch.int32),
        "weight_scale": empty(out_features, groups, dtype=dtype),
        "weight_shape": empty(2, dtype=torch.int64),
    }
    if scheme.zero_points:
        rows = _words(out_features, scheme.bits)
        tensors["weight_zero_point"] = empty(rows, groups, dtype=torch.int32)
    return tensors


def export_linear(
    path: str, scheme: LinearScheme, stored: Mapping[str, Tensor], dtype: torch.dtype
) -> ExportedLinear:
    """Convert the tensors of a quantized linear.

    Args:
        path: of the linear, for messages.
        scheme: to store it in.
        stored: tensors of the checkpoint by the last part of their names: ``weight_packed`` and
            ``weight_multiplier``, or ``weight_int8``; and ``weight_scale``.
        dtype: of the scales, but with an int8 input.

    Raises:
        ExportError: ``dtype`` cannot hold a scale.
    """
    row_scale = stored["weight_scale"].float().unsqueeze(1)
    multiplier = stored.get("weight_multiplier")
    codes = stored["weight_int8"] if "weight_int8" in stored else unpack_int4(stored["weight_packed"])
    out_features, in_features = codes.shape
    if scheme.int8_input:
        if multiplier is not None:
            grouped = codes.view(out_features, multiplier.shape[1], -1)
            codes = (grouped * multiplier.view(torch.int8).unsqueeze(2)).view(out_features, in_features)
        return ExportedLinear({"weight": codes, "weight_scale": row_scale}, 0.0)
    groups = 1 if scheme.group_size is None else in_features // scheme.group_size
    zero = None
    scale = row_scale
    if multiplier is not None:
        # Both numbers are integers or float32, so that the product is rounded once, to float32.
        sign = multiplier.view(torch.int8).sign().repeat_interleave(groups // multiplier.shape[1], 1)
        scale = row_scale * multiplier.view(torch.int8).abs().float()
        scale = scale.repeat_interleave(groups // multiplier.shape[1], 1)
        if scheme.zero_points:
            # -|s| c = |s| ((-1 - c) + 1): the codes turned over, with a zero point of -1.
            zero = sign.clamp_max(0)
            grouped = codes.view(out_features, groups, -1)
            codes = torch.where(zero.unsqueeze(2) < 0, -1 - grouped, grouped).view(out_features, in_features)
    used = (codes.view(out_features, groups, -1) != (0 if zero is None else zero.unsqueeze(2))).any(2)
    held, error = rounded(f"the scales of '{path}'", scale.contiguous(), dtype, used)
    tensors = {
        "weight_packed": pack_words(codes, scheme.bits),
        "weight_scale": held,
        "weight_shape": torch.tensor([out_features, in_features]),
    }
    if zero is not None:
        tensors["weight_zero_point"] = pack_words(zero.t(), scheme.bits).t().contiguous()
    return ExportedLinear(tensors, error)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Pack signed codes along the last dimension.

    Args:
        codes: int8 ``[rows, columns]``, each in ``[-2**(bits - 1), 2**(bits - 1))``.
        bits: 4 or 8.

    Returns:
        int32 ``[rows, ceil(columns * bits / 32)]``; what is beyond the columns is zero bits.
    """
    columns = codes.shape[1]
    numbers = (codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    numbers = torch.nn.functional.pad(numbers, (0, _words(columns, bits) * 32 // bits - columns))
    if bits == 4:
        numbers = numbers[:, 0::2] | (numbers[:, 1::2] << 4)
    return numbers.contiguous().view(torch.int32)


def rounded(
    what: str, numbers: Tensor, dtype: torch.dtype, used: Tensor | None = None
) -> tuple[Tensor, float]:
    """Numbers in another floating dtype.

    Args:
        what: they are, for the message.
        numbers: floating point.
        dtype: to round them to.
        used: bool, of their shape: scales of which some count, and must not become much else.

    Returns:
        The rounded numbers, and the largest relative error of those that count (0 without ``used``).

    Raises:
        ExportError: one becomes infinite, or, if it counts, is too small for the dtype.
    """
    held = numbers.to(dtype)
    error = 0.0
    if used is not None and bool(used.any()):
        error = float(((held.double() - numbers.double()).abs() / numbers.double())[used].max())
    if error > _LARGEST_ERROR or not bool(torch.isfinite(held).all()):
        name = str(dtype).removeprefix("torch.")
        raise ExportError(f"{name} cannot hold {what}. Give --dtype bfloat16, of float32's range.")
    return held, error


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)
