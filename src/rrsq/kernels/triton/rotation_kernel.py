"""Online Hadamard rotation of a token, alone or with its quantization, in one program.

The rotation is ``kron(dense, fast)`` where ``dense = kron(base, sylvester(DENSE_POWER))`` (block-diagonal where the
rotation is) acts on the rows of the token seen as ``[DENSE, FAST]`` and ``fast = sylvester(FAST)`` on its columns,
itself split into two factors. All are products with ±1 matrices on the tensor cores. 16-bit activations are exact
operands of the first product; the float32 results of a product enter the next one as the sum of two bfloat16
numbers (16 significant bits), or go through float32 arithmetic where the activations are float32.
"""

import triton
import triton.language as tl

from .quantize_kernel import fold

__all__ = ["rotation_kernel"]

_TINY = tl.constexpr(1e-30)
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def _sylvester_sign(i, j):
    """Entry of Sylvester's matrix: -1 to the number of common bits of ``i`` and ``j`` (below 2^16)."""
    common = i & j
    common ^= common >> 8
    common ^= common >> 4
    common ^= common >> 2
    common ^= common >> 1
    return 1 - 2 * (common & 1)


@triton.jit
def _fast_matrix(ORDER: tl.constexpr, SIZE: tl.constexpr, dtype: tl.constexpr):
    """``kron(identity, sylvester(ORDER))`` of ``[SIZE, SIZE]``."""
    i = tl.arange(0, SIZE)[:, None]
    j = tl.arange(0, SIZE)[None, :]
    sign = _sylvester_sign(i % ORDER, j % ORDER)
    return tl.where(i // ORDER == j // ORDER, sign, 0).to(dtype)


@triton.jit
def _multiply(y, matrix, EXACT: tl.constexpr):
    """``y @ matrix`` for float32 ``y`` and a ±1 matrix."""
    if EXACT:
        return tl.dot(y, matrix, input_precision="ieee")
    else:
        high = y.to(tl.bfloat16)
        low = (y - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(low, matrix, tl.dot(high, matrix))


@triton.jit
def rotation_kernel(
    x_pointer,
    base_pointer,
    out_pointer,
    scale_pointer,
    scale_factor,
    code_factor,
    normalization,
    CHANNELS: tl.constexpr,
    BASE: tl.constexpr,
    DENSE_POWER: tl.constexpr,
    DENSE: tl.constexpr,
    DENSE_PADDED: tl.constexpr,
    DENSE_STEP: tl.constexpr,
    FAST: tl.constexpr,
    FAST_INNER: tl.constexpr,
    FAST_OUTER: tl.constexpr,
    CODE_MAX: tl.constexpr,
    GROUP: tl.constexpr,
    QUANTIZE: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Rotate one token; with ``QUANTIZE`` write its int8 operand and scale, else float32.

    ``DENSE`` rows of ``FAST`` channels (``DENSE_PADDED``: next power of two). ``FAST_INNER * FAST_OUTER = FAST``, or
    ``FAST_INNER`` 1: columns are not mixed. ``normalization``: 1 / sqrt(order).
    """
    token = tl.program_id(0)
    row = token.to(tl.int64) * CHANNELS
    ORDER: tl.constexpr = BASE * DENSE_POWER
    dtype: tl.constexpr = x_pointer.dtype.element_ty
    out_row = tl.arange(0, DENSE_PADDED)
    column = tl.arange(0, FAST)
    if DENSE > 1:
        y = tl.zeros([DENSE_PADDED, FAST], tl.float32)
        for start in range(0, DENSE_PADDED, DENSE_STEP):
            in_row = start + tl.arange(0, DENSE_STEP)
            i = in_row[None, :]
            j = out_row[:, None]
            same_block = (i // ORDER == j // ORDER) & (i < DENSE) & (j < DENSE)
            base_offset = ((i % ORDER) // DENSE_POWER) * BASE + (j % ORDER) // DENSE_POWER
            entry = tl.load(base_pointer + base_offset, mask=same_block, other=0.0).to(tl.float32)
            if DENSE_POWER > 1:
                entry *= _sylvester_sign(i % DENSE_POWER, j % DENSE_POWER).to(tl.float32)
            x = tl.load(
                x_pointer + row + in_row[:, None] * FAST + column[None, :], mask=(in_row < DENSE)[:, None], other=0.0
            )
            if EXACT:
                y = tl.dot(entry, x.to(tl.float32), y, input_precision="ieee")
            else:
                y = tl.dot(entry.to(dtype), x, y)
    else:
        y = tl.load(x_pointer + row + column).to(tl.float32)[None, :]
    matrix_dtype: tl.constexpr = tl.float32 if EXACT else tl.bfloat16
    if FAST_INNER > 1:
        inner = _fast_matrix(FAST_INNER, FAST_INNER, matrix_dtype)
        y = _multiply(y.reshape(DENSE_PADDED * FAST_OUTER, FAST_INNER), inner, EXACT)
        if FAST_OUTER > 1:
            OUTER_SIZE: tl.constexpr = FAST_OUTER if FAST_OUTER > 16 else 16
            outer = _fast_matrix(FAST_OUTER, OUTER_SIZE, matrix_dtype)
            y = y.reshape(DENSE_PADDED, FAST_OUTER, FAST_INNER).permute(0, 2, 1)
            y = _multiply(y.reshape(DENSE_PADDED * FAST // OUTER_SIZE, OUTER_SIZE), outer, EXACT)
            y = y.reshape(DENSE_PADDED, FAST_INNER, FAST_OUTER).permute(0, 2, 1)
    y = y.reshape(DENSE_PADDED, FAST) * normalization
    offset = out_row[:, None] * FAST + column[None, :]
    if QUANTIZE:
        scale = tl.maximum(tl.max(tl.max(tl.abs(y), 1), 0) * scale_factor, _TINY)
        tl.store(scale_pointer + token, scale)
        if GROUP > 0:
            grouped = y.reshape(DENSE_PADDED * FAST // GROUP, GROUP)
            operand = fold(grouped, scale, code_factor, CODE_MAX).reshape(DENSE_PADDED, FAST)
        else:
            limited = tl.minimum(tl.maximum(y * tl.div_rn(1.0, scale), -CODE_MAX), CODE_MAX)
            operand = (limited + _ROUNDER) - _ROUNDER
        tl.store(out_pointer + row + offset, operand.to(tl.int8), mask=offset < CHANNELS)
    else:
        tl.store(out_pointer + row + offset, y, mask=offset < CHANNELS)
