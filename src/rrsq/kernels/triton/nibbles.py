"""Unpacking offset-binary nibbles to int8 operands, four at a time in a 32-bit register.

A byte holds two codes plus 8 (:mod:`rrsq.kernels.eager.packing`). With a multiplier ``u`` in 1..15 the byte
wanted is ``code * u = nibble * u - 8 u``. In four bytes at once, ``t = nibbles * u + (128 - 8 u)`` in every
byte is one multiply-add with no carry between bytes, since ``8 <= 128 + code * u <= 233``; flipping the top
bits then takes the 128 off in two's complement. Without a multiplier the nibble moved to the upper half of
its byte, top bit flipped, is ``16 * code``: one shift and one logic operation, and the accumulator is divided
by 16 at the end, exactly.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import triton
import triton.language as tl

__all__ = ["float_codes", "scaled_high", "scaled_low", "sixteenfold_high", "sixteenfold_low"]

_SCALED = """
{{
.reg .b32 t, u, c;
{extract}
and.b32 u, $2, 0xFF;
shl.b32 c, $2, 3;
sub.u32 c, 0x80808080, c;
mad.lo.u32 t, t, u, c;
xor.b32 $0, t, 0x80808080;
}}
"""
_SCALED_LOW = tl.constexpr(_SCALED.format(extract="and.b32 t, $1, 0x0F0F0F0F;"))
_SCALED_HIGH = tl.constexpr(_SCALED.format(extract="shr.u32 t, $1, 4; and.b32 t, t, 0x0F0F0F0F;"))
_SIXTEENFOLD_LOW = tl.constexpr(
    "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 t, t, 0xF0F0F0F0; xor.b32 $0, t, 0x80808080; }"
)
_SIXTEENFOLD_HIGH = tl.constexpr("{ .reg .b32 t; and.b32 t, $1, 0xF0F0F0F0; xor.b32 $0, t, 0x80808080; }")


@triton.jit
def scaled_low(packed, multiplier, PTX: tl.constexpr):
    """``code * multiplier`` of the low nibbles as int8; ``packed`` and ``multiplier`` uint8 of one shape.

    With ``PTX`` four consecutive elements must share their multiplier.
    """
    if PTX:
        return tl.inline_asm_elementwise(
            _SCALED_LOW, "=r,r,r", [packed, multiplier], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        return (((packed & 0xF).to(tl.int32) - 8) * multiplier.to(tl.int32)).to(tl.int8)


@triton.jit
def scaled_high(packed, multiplier, PTX: tl.constexpr):
    """``code * multiplier`` of the high nibbles; see :func:`scaled_low`."""
    if PTX:
        return tl.inline_asm_elementwise(
            _SCALED_HIGH, "=r,r,r", [packed, multiplier], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        return (((packed >> 4).to(tl.int32) - 8) * multiplier.to(tl.int32)).to(tl.int8)


@triton.jit
def sixteenfold_low(packed, PTX: tl.constexpr):
    """``16 * code`` of the low nibbles of uint8 ``packed``, as int8."""
    if PTX:
        return tl.inline_asm_elementwise(
            _SIXTEENFOLD_LOW, "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        return (((packed & 0xF).to(tl.int32) - 8) * 16).to(tl.int8)


@triton.jit
def sixteenfold_high(packed, PTX: tl.constexpr):
    """``16 * code`` of the high nibbles of uint8 ``packed``, as int8."""
    if PTX:
        return tl.inline_asm_elementwise(
            _SIXTEENFOLD_HIGH, "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        return (((packed >> 4).to(tl.int32) - 8) * 16).to(tl.int8)


@triton.jit
def float_codes(nibble, multiplier, dtype: tl.constexpr, GROUP: tl.constexpr, PTX: tl.constexpr):
    """``code * multiplier`` in ``dtype``, float16 or bfloat16; exact. Without groups ``code``.

    A nibble in the last bits of the mantissa of 2^7 or 2^10 is that power plus the nibble: no integer is
    converted. Without ``PTX`` the result is float32, since the interpreter does not compute in bfloat16.
    """
    if not PTX:
        code = (nibble.to(tl.int32) - 8).to(tl.float32)
    elif dtype == tl.bfloat16:
        code = (nibble.to(tl.uint16) | 0x4300).to(dtype, bitcast=True) - 136
    else:
        code = (nibble.to(tl.uint16) | 0x6400).to(dtype, bitcast=True) - 1032
    if GROUP > 0:
        code *= multiplier.to(code.dtype)
    return code
