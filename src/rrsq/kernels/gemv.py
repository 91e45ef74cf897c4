"""The product with one token: every weight byte is read once, products are taken by the four-way dot unit."""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from collections.abc import Callable

import torch
from torch import Tensor

from ._triton import COMPILED, ceil_div, tl, triton
from .packing import chunk_words, group_size_of, pack_block
from .plans import GemvPlan

__all__ = ["ROWS", "multiply_rows", "prepared_gemv"]

ROWS = 4
_DOT4 = tl.constexpr("dp4a.s32.s32 $0, $1, $2, 0;")


@triton.jit
def _byte(word, index: tl.constexpr):
    return (word << (24 - 8 * index)) >> 24


@triton.jit
def _dot4(a, b, PTX: tl.constexpr):
    """Dot product of the four int8 in each int32 of ``a`` and ``b``."""
    if PTX:
        return tl.inline_asm_elementwise(_DOT4, "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return (
            _byte(a, 0) * _byte(b, 0)
            + _byte(a, 1) * _byte(b, 1)
            + _byte(a, 2) * _byte(b, 2)
            + _byte(a, 3) * _byte(b, 3)
        )


@triton.jit
def _step(
    packed_pointers,
    low_multipliers,
    high_multipliers,
    x_low,
    x_high,
    inside,
    GROUP: tl.constexpr,
    PTX: tl.constexpr,
):
    """Products of one weight row with a step of the token, int32 ``[CHUNKS, CHUNK_WORDS]``."""
    packed = tl.load(packed_pointers, mask=inside[:, None], other=0)
    low = _dot4(((packed << 4) & -0x0F0F0F10) ^ -0x7F7F7F80, x_low, PTX)
    high = _dot4((packed & -0x0F0F0F10) ^ -0x7F7F7F80, x_high, PTX)
    if GROUP > 0:
        low_multiplier = tl.load(low_multipliers, mask=inside, other=0).to(tl.int32)
        high_multiplier = tl.load(high_multipliers, mask=inside, other=0).to(tl.int32)
        return (low * low_multiplier[:, None] + high * high_multiplier[:, None]) >> 4
    else:
        return (low + high) >> 4


@triton.jit
def multiply_rows(
    operand_pointer,
    packed_pointer,
    multiplier_pointer,
    first,
    out_features,
    in_features,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK_WORDS: tl.constexpr,
    PTX: tl.constexpr,
):
    """Four (``ROWS``) weight rows from ``first`` on times one token, float32 ``[4]``.

    ``operand_pointer`` and ``packed_pointer`` are int32 views: four channels or four bytes a word. A chunk is
    ``CHUNK_WORDS`` words whose low nibbles share one multiplier, and whose high nibbles do; a step is
    ``CHUNKS``. The rows are written out one by one, so that each thread keeps its part of the token for all
    of them and sums in its own registers until the end.
    """
    row0 = tl.minimum(first, out_features - 1).to(tl.int64)
    row1 = tl.minimum(first + 1, out_features - 1).to(tl.int64)
    row2 = tl.minimum(first + 2, out_features - 1).to(tl.int64)
    row3 = tl.minimum(first + 3, out_features - 1).to(tl.int64)
    row_words = tl.multiple_of(in_features // 8, 4)
    groups = in_features // GROUP if GROUP > 0 else 0
    word = tl.arange(0, CHUNK_WORDS)
    chunks = row_words // CHUNK_WORDS
    total0 = tl.zeros([CHUNKS, CHUNK_WORDS], tl.int32)
    total1 = tl.zeros([CHUNKS, CHUNK_WORDS], tl.int32)
    total2 = tl.zeros([CHUNKS, CHUNK_WORDS], tl.int32)
    total3 = tl.zeros([CHUNKS, CHUNK_WORDS], tl.int32)
    for start in range(0, chunks, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        inside = chunk < chunks
        first_byte = chunk * (4 * CHUNK_WORDS)
        channel = (first_byte // HALF) * (2 * HALF) + first_byte % HALF
        x_pointers = operand_pointer + tl.multiple_of(channel // 4, 4)[:, None] + word[None, :]
        x_low = tl.load(x_pointers, mask=inside[:, None], other=0)
        x_high = tl.load(x_pointers + HALF // 4, mask=inside[:, None], other=0)
        packed = packed_pointer + (chunk * CHUNK_WORDS)[:, None] + word[None, :]
        low = multiplier_pointer
        high = multiplier_pointer
        if GROUP > 0:
            low = multiplier_pointer + channel // GROUP
            high = multiplier_pointer + (channel + HALF) // GROUP
        total0 += _step(
            packed + row0 * row_words,
            low + row0 * groups,
            high + row0 * groups,
            x_low,
            x_high,
            inside,
            GROUP,
            PTX,
        )
        total1 += _step(
            packed + row1 * row_words,
            low + row1 * groups,
            high + row1 * groups,
            x_low,
            x_high,
            inside,
            GROUP,
            PTX,
        )
        total2 += _step(
            packed + row2 * row_words,
            low + row2 * groups,
            high + row2 * groups,
            x_low,
            x_high,
            inside,
            GROUP,
            PTX,
        )
        total3 += _step(
            packed + row3 * row_words,
            low + row3 * groups,
            high + row3 * groups,
            x_low,
            x_high,
            inside,
            GROUP,
            PTX,
        )
    # The last two dimensions count rows: [.., i, j] is row 2 j + i.
    total = tl.join(tl.join(total0, total1), tl.join(total2, total3))
    return tl.sum(tl.sum(total, 1), 0).permute(1, 0).reshape(4).to(tl.float32)


@triton.jit
def _gemv_kernel(
    operand_pointer,
    scale_pointer,
    packed_pointer,
    multiplier_pointer,
    weight_scale_pointer,
    bias_pointer,
    out_pointer,
    out_features,
    in_features,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK_WORDS: tl.constexpr,
    PTX: tl.constexpr,
):
    """Four output channels of the one token, int8 ``operand_pointer``; see :func:`multiply_rows`."""
    first = tl.program_id(0) * 4
    y = multiply_rows(
        operand_pointer.to(tl.pointer_type(tl.int32), bitcast=True),
        packed_pointer,
        multiplier_pointer,
        first,
        out_features,
        in_features,
        HALF,
        GROUP,
        CHUNKS,
        CHUNK_WORDS,
        PTX,
    )
    out = first + tl.arange(0, 4)
    mask = out < out_features
    y = y * tl.load(scale_pointer) * tl.load(weight_scale_pointer + out, mask=mask, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias_pointer + out, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_pointer + out, y.to(out_pointer.dtype.element_ty), mask=mask)


def prepared_gemv(
    plan: GemvPlan,
    packed: Tensor,
    weight_scale: Tensor,
    multiplier: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    leading: tuple[int, ...],
) -> Callable[..., Tensor]:
    """For one weight, a function of ``operand`` and ``scale`` (and ``out``, if it is there) to ``out``.

    ``out`` ``[*leading, out_features]`` is that of :func:`rrsq.kernels.linear_int8`, of one token.
    """
    out_features, in_features = packed.shape[0], 2 * packed.shape[1]
    group_size = group_size_of(in_features, multiplier)
    kernel = _gemv_kernel[(ceil_div(out_features, ROWS),)]
    words, device = packed.view(torch.int32), packed.device
    multipliers = packed if multiplier is None else multiplier
    biases, has_bias = (weight_scale, False) if bias is None else (bias, True)
    shape, half = (*leading, out_features), pack_block(in_features) // 2
    chunks, of_chunk, warps = plan.chunks, chunk_words(group_size), plan.warps

    def run(operand: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = torch.empty(*shape, dtype=out_dtype, device=device)
        kernel(
            operand,
            scale,
            words,
            multipliers,
            weight_scale,
            biases,
            out,
            out_features,
            in_features,
            half,
            group_size,
            has_bias,
            chunks,
            of_chunk,
            COMPILED,
            enable_fp_fusion=False,
            num_warps=warps,
        )
        return out

    return run
