"""Unpacking a whole weight: to the int8 operand, or to floating point."""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import triton
import triton.language as tl

__all__ = ["unpack_kernel", "unpack_words_kernel"]


@triton.jit
def unpack_words_kernel(
    packed_pointer,
    multiplier_pointer,
    out_pointer,
    rows,
    in_features,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK_WORDS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Write ``code * multiplier`` of four bytes at a time; pointers are int32 views.

    A chunk is ``CHUNK_WORDS`` words whose low nibbles share one multiplier and whose high nibbles do. The
    arithmetic in a word is that of :mod:`.nibbles`.
    """
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    chunk = tl.program_id(1) * CHUNKS + tl.arange(0, CHUNKS)
    word = tl.arange(0, CHUNK_WORDS)
    row_words = tl.multiple_of(in_features // 8, 4)
    inside = (row < rows)[:, None] & (chunk < row_words // CHUNK_WORDS)[None, :]
    packed_offset = (chunk * CHUNK_WORDS)[:, None] + word[None, :]
    packed = tl.load(
        packed_pointer + (row * row_words)[:, None, None] + packed_offset[None, :, :],
        mask=inside[:, :, None],
        other=0,
    )
    first_byte = chunk * (4 * CHUNK_WORDS)
    channel = (first_byte // HALF) * (2 * HALF) + first_byte % HALF
    low = packed & 0x0F0F0F0F
    high = (packed >> 4) & 0x0F0F0F0F
    if GROUP > 0:
        multiplier = multiplier_pointer + (row * (in_features // GROUP))[:, None]
        low_multiplier = tl.load(multiplier + (channel // GROUP)[None, :], mask=inside, other=0).to(tl.int32)
        high_multiplier = tl.load(multiplier + ((channel + HALF) // GROUP)[None, :], mask=inside, other=0).to(
            tl.int32
        )
        low = low * low_multiplier[:, :, None] + (-0x7F7F7F80 - 0x08080808 * low_multiplier)[:, :, None]
        high = high * high_multiplier[:, :, None] + (-0x7F7F7F80 - 0x08080808 * high_multiplier)[:, :, None]
    else:
        low += 0x78787878
        high += 0x78787878
    out = (
        out_pointer
        + (row * (2 * row_words))[:, None, None]
        + (tl.multiple_of(channel // 4, 4)[:, None] + word[None, :])[None, :, :]
    )
    tl.store(out, low ^ -0x7F7F7F80, mask=inside[:, :, None])
    tl.store(out + HALF // 4, high ^ -0x7F7F7F80, mask=inside[:, :, None])


@triton.jit
def unpack_kernel(
    packed_pointer,
    multiplier_pointer,
    scale_pointer,
    out_pointer,
    rows,
    row_bytes,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    DEQUANTIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """Write ``code * multiplier`` (times the row's scale with ``DEQUANTIZE``) of a tile of packed bytes, any
    sizes.

    ``HALF`` is half a packing block; ``GROUP`` the channels of a multiplier, 0 without multipliers.
    """
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    byte = (tl.program_id(1) * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES))[None, :]
    mask = (row < rows) & (byte < row_bytes)
    packed = tl.load(packed_pointer + row * row_bytes + byte, mask=mask, other=0)
    low = (packed & 0xF).to(tl.int32) - 8
    high = (packed >> 4).to(tl.int32) - 8
    channel = (byte // HALF) * (2 * HALF) + byte % HALF
    if HALF % 16 == 0:
        channel = tl.max_contiguous(tl.multiple_of(channel, [1, 16]), [1, 16])
    if GROUP > 0:
        groups = 2 * row_bytes // GROUP
        multiplier = multiplier_pointer + row * groups
        low *= tl.load(multiplier + channel // GROUP, mask=mask, other=0).to(tl.int32)
        high *= tl.load(multiplier + (channel + HALF) // GROUP, mask=mask, other=0).to(tl.int32)
    out = out_pointer + row * (2 * row_bytes) + channel
    if DEQUANTIZE:
        scale = tl.load(scale_pointer + row, mask=row < rows, other=0.0)
        tl.store(out, (low.to(tl.float32) * scale).to(out_pointer.dtype.element_ty), mask=mask)
        tl.store(out + HALF, (high.to(tl.float32) * scale).to(out_pointer.dtype.element_ty), mask=mask)
    else:
        tl.store(out, low.to(tl.int8), mask=mask)
        tl.store(out + HALF, high.to(tl.int8), mask=mask)
