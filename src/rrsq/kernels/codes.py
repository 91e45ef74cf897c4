"""Signed codes of activations and their scales, as the references and the kernels compute them.

A token that holds NaN or an infinite value has the scale NaN, whatever its codes: every result of it is NaN.
Kernels look for the largest magnitude as an integer, in which NaN is larger than any number, since Triton's
maximum of floats passes over it.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import torch
from torch import Tensor

from ._triton import tl, triton

__all__ = [
    "MULTIPLIER_MAX",
    "TINY",
    "code_max",
    "code_scale",
    "integer_scales",
    "largest_magnitude",
    "multiplied_codes",
    "round_to_code",
    "rounded_to",
    "scale_of",
]

MULTIPLIER_MAX = 18
"""Largest multiplier of a group of activations: a 4-bit code times it fits into int8."""
TINY = 1e-30
"""Least scale."""


def code_max(bits: int) -> int:
    """Largest code of the symmetric ``bits``-bit grid: 7 for 4 bits, 127 for 8."""
    return 2 ** (bits - 1) - 1


def code_scale(largest: Tensor, factor: float) -> Tensor:
    """``largest * factor``, at least :data:`TINY`; NaN where ``largest`` (>= 0) is NaN or infinite."""
    return torch.where(largest < torch.inf, (largest * factor).clamp_min(TINY), torch.nan)


def integer_scales(group_max: Tensor, bits: int, clip: float) -> tuple[Tensor, Tensor]:
    """A scale a token and integer multipliers from the largest magnitudes ``[tokens, groups]``, float32.

    With ``c = code_max(bits)``, ``M_ig`` the largest magnitude of token ``i`` in group ``g`` and ``A_i`` that
    of the whole token: ``a_i = clip * A_i / (18 c)``, ``m_ig = ceil(clip * M_ig / (c a_i))`` in 1..18.

    Returns:
        ``a`` ``[tokens]`` and ``m`` ``[tokens, groups]``, whole numbers, both float32.
    """
    c = code_max(bits)
    scale = code_scale(group_max.amax(1), clip / (c * MULTIPLIER_MAX))
    multiplier = (group_max * (clip / c) / scale.unsqueeze(1)).ceil().clamp(1, MULTIPLIER_MAX)
    return scale, multiplier


_ROUNDER = tl.constexpr(12582912.0)
_ROUNDER_BITS = tl.constexpr(0x4B400000)
_TINY = tl.constexpr(1e-30)
_MULTIPLIER_MAX = tl.constexpr(18.0)


@triton.jit
def largest_magnitude(x, axis: tl.constexpr):
    """Largest ``|x|`` of float32 ``x`` along an axis; NaN where there is one."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis).to(tl.float32, bitcast=True)


@triton.jit
def scale_of(largest, factor):
    """:func:`code_scale`, float32."""
    scale = largest * factor
    return tl.where(largest < float("inf"), tl.where(scale < _TINY, _TINY, scale), float("nan"))


@triton.jit
def round_to_code(value, CODE_MAX: tl.constexpr):
    """Round to nearest, ties to even, within ±CODE_MAX, as int32.

    Adding 1.5 * 2^23 leaves the integer in the low bits; a conversion instruction has an eighth of the
    throughput.
    """
    limited = tl.minimum(tl.maximum(value, -CODE_MAX), CODE_MAX)
    return (limited + _ROUNDER).to(tl.int32, bitcast=True) - _ROUNDER_BITS


@triton.jit
def rounded_to(value, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """float32 rounded to another dtype, ties to even, as float32. The interpreter cuts off bfloat16."""
    if tl.float32 == DTYPE:
        return value
    elif PTX or tl.bfloat16 != DTYPE:
        return value.to(DTYPE).to(tl.float32)
    else:
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) & -65536
        return tl.where(value == value, rounded.to(tl.float32, bitcast=True), value)


@triton.jit
def multiplied_codes(grouped, group_max, scale, code_factor, CODE_MAX: tl.constexpr):
    """``code * m``, int32, of float32 ``[groups, group size]`` for a token's ``scale``.

    ``code_factor`` is clip / CODE_MAX; see :func:`integer_scales`.
    """
    multiplier = tl.ceil(tl.div_rn(group_max * code_factor, tl.broadcast_to(scale, group_max.shape)))
    multiplier = tl.minimum(tl.maximum(multiplier, 1.0), _MULTIPLIER_MAX)
    inverse = tl.div_rn(tl.full(multiplier.shape, 1.0, tl.float32), scale * multiplier)
    return round_to_code(grouped * inverse[:, None], CODE_MAX) * multiplier.to(tl.int32)[:, None]
