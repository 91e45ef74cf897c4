"""Unpacking a whole weight: to the int8 operand, or to floating point."""

import triton
import triton.language as tl

__all__ = ["unpack_kernel"]


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
    """Write ``code * multiplier`` (times the row's scale with ``DEQUANTIZE``) of a tile of packed bytes.

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
