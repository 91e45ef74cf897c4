"""Online Hadamard rotation of tokens, alone or with their quantization, in one pass.

A token is seen as ``[DENSE, FAST]``. The rotation is ``kron(dense, sylvester(FAST))``: a product from the
left with ``dense = kron(base, sylvester(DENSE_POWER))`` (block-diagonal where the rotation is), then one from
the right with Sylvester's matrix. Both run on the tensor cores with ±1 matrices that stay in shared memory
while a program walks over its tokens. Operands are float16, rounded as :mod:`..eager.rotation` defines, so
that the sums are exact and the results the reference's. With ``EXACT`` they are float32 and nothing is
rounded.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import triton
import triton.language as tl

from .quantize_kernel import fold, round_to_code

__all__ = ["rotation_kernel"]

_TINY = tl.constexpr(1e-30)
_EXPONENT_BITS = tl.constexpr(0x7F800000)
_SMALLEST_EXPONENT = tl.constexpr(1 << 23)
_LARGEST_EXPONENT = tl.constexpr(244 << 23)
_EXPONENTS = tl.constexpr(245 << 23)
_NINE = tl.constexpr(9 << 23)


@triton.jit
def _dot(a, b, accumulator, EXACT: tl.constexpr):
    if EXACT:
        return tl.dot(a, b, accumulator, input_precision="ieee")
    else:
        return tl.dot(a, b, accumulator)


@triton.jit
def _to_half_range(largest):
    """Powers of two that take ``largest`` (float32 >= 0) into [2^-9, 2^-8), and back."""
    exponent = largest.to(tl.int32, bitcast=True) & _EXPONENT_BITS
    exponent = tl.minimum(tl.maximum(exponent, _SMALLEST_EXPONENT), _LARGEST_EXPONENT)
    down = (-exponent + _EXPONENTS).to(tl.float32, bitcast=True)
    up = (exponent + _NINE).to(tl.float32, bitcast=True)
    return down, up


@triton.jit
def _load_rows(pointer, row, column, DENSE: tl.constexpr, FAST: tl.constexpr):
    """Rows of a token, float32, zeros past the last."""
    x = tl.load(pointer + row[:, None] * FAST + column[None, :], mask=(row < DENSE)[:, None], other=0.0)
    return x.to(tl.float32)


@triton.jit(do_not_specialize=["tokens"])
def rotation_kernel(
    x_pointer,
    dense_pointer,
    fast_pointer,
    out_pointer,
    scale_pointer,
    tokens,
    scale_factor,
    code_factor,
    normalization,
    CHANNELS: tl.constexpr,
    DENSE: tl.constexpr,
    DENSE_PADDED: tl.constexpr,
    DENSE_STEP: tl.constexpr,
    FAST: tl.constexpr,
    MIX_FAST: tl.constexpr,
    CODE_MAX: tl.constexpr,
    GROUP: tl.constexpr,
    QUANTIZE: tl.constexpr,
    EXACT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Rotate tokens; with ``QUANTIZE`` write their int8 operands and scales, else float32.

    ``dense_pointer`` and ``fast_pointer``: see :func:`.rotation_factors.rotation_factors`. ``DENSE_STEP``
    equal to ``DENSE_PADDED``: the dense factor is read once a program; smaller: in steps, for each token.
    ``MIX_FAST``: whether columns are mixed. ``normalization``: 1 / sqrt(order).
    """
    row = tl.arange(0, DENSE_PADDED)
    step_row = tl.arange(0, DENSE_STEP)
    column = tl.arange(0, FAST)
    WHOLE: tl.constexpr = DENSE_STEP == DENSE_PADDED
    if WHOLE:
        dense = tl.load(dense_pointer + row[:, None] * DENSE_PADDED + row[None, :])
    if MIX_FAST:
        fast = tl.load(fast_pointer + column[:, None] * FAST + column[None, :])
    offset = row[:, None] * FAST + column[None, :]
    for token in tl.range(tl.program_id(0), tokens, tl.num_programs(0), num_stages=STAGES if WHOLE else 1):
        start = tl.cast(token, tl.int64) * CHANNELS
        y = tl.zeros([DENSE_PADDED, FAST], tl.float32)
        if WHOLE:
            x = _load_rows(x_pointer + start, row, column, DENSE, FAST)
            if EXACT:
                y = _dot(dense, x, y, EXACT)
            else:
                down, up = _to_half_range(tl.max(tl.max(tl.abs(x), 1), 0))
                y = _dot(dense, (x * down).to(tl.float16), y, EXACT)
        else:
            largest = tl.zeros([DENSE_STEP], tl.float32)
            if not EXACT:
                for first in tl.range(0, DENSE, DENSE_STEP, num_stages=STAGES):
                    x = _load_rows(x_pointer + start, first + step_row, column, DENSE, FAST)
                    largest = tl.maximum(largest, tl.max(tl.abs(x), 1))
            down, up = _to_half_range(tl.max(largest, 0))
            for first in tl.range(0, DENSE, DENSE_STEP, num_stages=STAGES):
                in_row = first + step_row
                part = tl.load(dense_pointer + row[:, None] * DENSE_PADDED + in_row[None, :])
                x = _load_rows(x_pointer + start, in_row, column, DENSE, FAST)
                if EXACT:
                    y = _dot(part, x, y, EXACT)
                else:
                    y = _dot(part, (x * down).to(tl.float16), y, EXACT)
        if MIX_FAST:
            mixed = tl.zeros([DENSE_PADDED, FAST], tl.float32)
            if EXACT:
                y = _dot(y, fast, mixed, EXACT) * normalization
            else:
                row_down, row_up = _to_half_range(tl.max(tl.abs(y), 1))
                mixed = _dot((y * row_down[:, None]).to(tl.float16), fast, mixed, EXACT)
                y = mixed * (up * row_up * normalization)[:, None]
        elif EXACT:
            y = y * normalization
        else:
            y = y * (up * normalization)
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
