"""Online Hadamard rotation of tokens, alone or with their quantization, in one pass.

A token is seen as ``[DENSE, FAST]``. The rotation is ``kron(dense, sylvester(FAST))``: a product from the
left with ``dense = kron(base, sylvester(DENSE_POWER))`` (block-diagonal where the rotation is), then one from
the right with Sylvester's matrix. Both run on the tensor cores with ±1 matrices that stay in shared memory
while a program walks over its tokens. 16-bit activations are exact operands of the first product; its float32
result enters the second as the sum of two bfloat16 numbers (16 significant bits). Where the activations are
float32 all products are too.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import triton
import triton.language as tl

from .quantize_kernel import fold, round_to_code

__all__ = ["dense_matrix_kernel", "rotation_kernel"]

_TINY = tl.constexpr(1e-30)


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
def _dense_entries(
    base_pointer, out_row, in_row, BASE: tl.constexpr, DENSE_POWER: tl.constexpr, DENSE: tl.constexpr
):
    """``dense[in_row, out_row]`` in float32, as ``[out_row, in_row]``; zero outside of it."""
    ORDER: tl.constexpr = BASE * DENSE_POWER
    i = in_row[None, :]
    j = out_row[:, None]
    inside = (i // ORDER == j // ORDER) & (i < DENSE) & (j < DENSE)
    base_offset = ((i % ORDER) // DENSE_POWER) * BASE + (j % ORDER) // DENSE_POWER
    entries = tl.load(base_pointer + base_offset, mask=inside, other=0.0).to(tl.float32)
    return entries * _sylvester_sign(i % DENSE_POWER, j % DENSE_POWER).to(tl.float32)


@triton.jit
def dense_matrix_kernel(
    base_pointer,
    out_pointer,
    BASE: tl.constexpr,
    DENSE_POWER: tl.constexpr,
    DENSE: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the dense factor ``[PADDED, PADDED]``, transposed: for one too large to build in a program."""
    out_row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_row = tl.arange(0, PADDED)
    entries = _dense_entries(base_pointer, out_row, in_row, BASE, DENSE_POWER, DENSE)
    tl.store(
        out_pointer + out_row[:, None] * PADDED + in_row[None, :], entries.to(out_pointer.dtype.element_ty)
    )


@triton.jit
def _dot(a, b, accumulator, EXACT: tl.constexpr, COMPILED: tl.constexpr):
    """``a @ b + accumulator``; Triton's interpreter has no bfloat16 product, and gets the same in float32."""
    if EXACT or not COMPILED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    else:
        return tl.dot(a, b, accumulator)


@triton.jit(do_not_specialize=["tokens"])
def rotation_kernel(
    x_pointer,
    dense_pointer,
    out_pointer,
    scale_pointer,
    tokens,
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
    MIX_FAST: tl.constexpr,
    CODE_MAX: tl.constexpr,
    GROUP: tl.constexpr,
    QUANTIZE: tl.constexpr,
    EXACT: tl.constexpr,
    COMPILED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Rotate tokens; with ``QUANTIZE`` write their int8 operands and scales, else float32.

    ``DENSE_PADDED``: next power of two of ``DENSE``. ``DENSE_STEP`` equal to it: ``dense_pointer`` is the
    base matrix, and the dense factor is built once a program; smaller: it is the finished factor of
    :func:`dense_matrix_kernel`, read in steps. ``MIX_FAST``: whether columns are mixed. ``normalization``: 1
    / sqrt(order).
    """
    dtype: tl.constexpr = x_pointer.dtype.element_ty
    split_dtype: tl.constexpr = tl.float32 if EXACT else tl.bfloat16
    row = tl.arange(0, DENSE_PADDED)
    column = tl.arange(0, FAST)
    WHOLE: tl.constexpr = DENSE_STEP == DENSE_PADDED
    if WHOLE:
        dense = _dense_entries(dense_pointer, row, row, BASE, DENSE_POWER, DENSE).to(dtype)
    if MIX_FAST:
        fast = _sylvester_sign(column[:, None], column[None, :]).to(tl.float32).to(split_dtype)
    offset = row[:, None] * FAST + column[None, :]
    for token in tl.range(tl.program_id(0), tokens, tl.num_programs(0), num_stages=STAGES if WHOLE else 1):
        start = tl.cast(token, tl.int64) * CHANNELS
        y = tl.zeros([DENSE_PADDED, FAST], tl.float32)
        if WHOLE:
            x = tl.load(x_pointer + start + offset, mask=(row < DENSE)[:, None], other=0.0)
            y = _dot(dense, x, y, EXACT, COMPILED)
        else:
            for first in tl.range(0, DENSE_PADDED, DENSE_STEP, num_stages=STAGES):
                in_row = first + tl.arange(0, DENSE_STEP)
                part = tl.load(dense_pointer + row[:, None] * DENSE_PADDED + in_row[None, :])
                x = tl.load(
                    x_pointer + start + in_row[:, None] * FAST + column[None, :],
                    mask=(in_row < DENSE)[:, None],
                    other=0.0,
                )
                y = _dot(part, x, y, EXACT, COMPILED)
        if MIX_FAST:
            high = y.to(split_dtype)
            zero = tl.zeros([DENSE_PADDED, FAST], tl.float32)
            mixed = _dot(high, fast, zero, EXACT, COMPILED)
            if not EXACT:
                low = (y - high.to(tl.float32)).to(split_dtype)
                mixed = _dot(low, fast, mixed, EXACT, COMPILED)
            y = mixed
        y = y * normalization
        if QUANTIZE:
            if GROUP > 0:
                grouped = y.reshape(DENSE_PADDED * FAST // GROUP, GROUP)
                group_max = tl.max(tl.abs(grouped), 1)
                scale = tl.maximum(tl.max(group_max, 0) * scale_factor, _TINY)
                operand = fold(grouped, group_max, scale, code_factor, CODE_MAX).reshape(DENSE_PADDED, FAST)
            else:
                scale = tl.maximum(tl.max(tl.max(tl.abs(y), 1), 0) * scale_factor, _TINY)
                operand = round_to_code(y * tl.div_rn(1.0, scale), CODE_MAX)
            tl.store(scale_pointer + token, scale)
            tl.store(out_pointer + start + offset, operand.to(tl.int8), mask=offset < CHANNELS)
        else:
            tl.store(out_pointer + start + offset, y, mask=offset < CHANNELS)
