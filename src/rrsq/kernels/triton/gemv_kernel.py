"""The product with few tokens: every weight byte is read once, products are taken by the four-way dot unit."""

import triton
import triton.language as tl

__all__ = ["gemv_kernel"]

_DOT4 = tl.constexpr("dp4a.s32.s32 $0, $1, $2, 0;")


@triton.jit
def _byte(word, index: tl.constexpr):
    return (word << (24 - 8 * index)) >> 24


@triton.jit
def _dot4(a, b, PTX: tl.constexpr):
    """Dot product of the four int8 in each int32 of ``a`` and ``b``."""
    if PTX:
        a, b = tl.broadcast(a, b)
        return tl.inline_asm_elementwise(_DOT4, "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return (
            _byte(a, 0) * _byte(b, 0)
            + _byte(a, 1) * _byte(b, 1)
            + _byte(a, 2) * _byte(b, 2)
            + _byte(a, 3) * _byte(b, 3)
        )


@triton.jit(do_not_specialize=["tokens"])
def gemv_kernel(
    operand_pointer,
    scale_pointer,
    packed_pointer,
    multiplier_pointer,
    weight_scale_pointer,
    bias_pointer,
    out_pointer,
    tokens,
    out_features,
    in_features,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK_WORDS: tl.constexpr,
    PTX: tl.constexpr,
):
    """``TOKENS`` rows of the result for ``BLOCK_OUT`` output channels.

    ``operand_pointer`` and ``packed_pointer`` are int32 views: four channels or four bytes a word. A chunk is
    ``CHUNK_WORDS`` words whose low nibbles share one multiplier, and whose high nibbles do.
    """
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = tl.minimum(out, out_features - 1).to(tl.int64)
    token = tl.arange(0, TOKENS)
    x_row = tl.minimum(token, tokens - 1)
    word = tl.arange(0, CHUNK_WORDS)
    chunks = in_features // (8 * CHUNK_WORDS)
    total = tl.zeros([TOKENS, BLOCK_OUT, CHUNKS], tl.int32)
    for start in range(0, chunks, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        inside = chunk < chunks
        packed_offset = (chunk * CHUNK_WORDS)[:, None] + word[None, :]
        packed = tl.load(
            packed_pointer + (row * (in_features // 8))[:, None, None] + packed_offset[None, :, :],
            mask=inside[None, :, None],
            other=0,
        )
        first_byte = chunk * (4 * CHUNK_WORDS)
        channel = (first_byte // HALF) * (2 * HALF) + first_byte % HALF
        x_offset = (channel // 4)[:, None] + word[None, :]
        x_pointers = operand_pointer + (x_row * (in_features // 4))[:, None, None] + x_offset[None, :, :]
        x_low = tl.load(x_pointers, mask=inside[None, :, None], other=0)
        x_high = tl.load(x_pointers + HALF // 4, mask=inside[None, :, None], other=0)
        low = ((packed << 4) & -0x0F0F0F10) ^ -0x7F7F7F80
        high = (packed & -0x0F0F0F10) ^ -0x7F7F7F80
        low_sum = tl.sum(_dot4(low[None, :, :, :], x_low[:, None, :, :], PTX), 3) >> 4
        high_sum = tl.sum(_dot4(high[None, :, :, :], x_high[:, None, :, :], PTX), 3) >> 4
        if GROUP > 0:
            multiplier = multiplier_pointer + (row * (in_features // GROUP))[:, None]
            low_multiplier = tl.load(
                multiplier + (channel // GROUP)[None, :], mask=inside[None, :], other=0
            ).to(tl.int32)
            high_multiplier = tl.load(
                multiplier + ((channel + HALF) // GROUP)[None, :], mask=inside[None, :], other=0
            ).to(tl.int32)
            total += low_sum * low_multiplier[None, :, :] + high_sum * high_multiplier[None, :, :]
        else:
            total += low_sum + high_sum
    y = tl.sum(total, 2).to(tl.float32)
    scale = tl.load(scale_pointer + x_row)
    y = y * scale[:, None] * tl.load(weight_scale_pointer + row)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_pointer + row).to(tl.float32)[None, :]
    offset = token.to(tl.int64)[:, None] * out_features + out[None, :]
    mask = (token < tokens)[:, None] & (out < out_features)[None, :]
    tl.store(out_pointer + offset, y.to(out_pointer.dtype.element_ty), mask=mask)
