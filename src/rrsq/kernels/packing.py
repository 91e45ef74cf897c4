"""INT4 packing: two codes a byte, laid out so that a kernel reads activations contiguously.

The input channels are cut into blocks of ``b = gcd(in_features, 128)``. In each block byte ``j`` holds the
code of channel ``j`` in its low nibble and that of channel ``j + b/2`` in its high nibble, so that the low
nibbles of ``b/2`` consecutive bytes are ``b/2`` consecutive channels. Nibbles are offset-binary:
``code + 8``, which unpacks with one mask and no sign extension.

Kernels unpack nibbles to int8 operands four at a time in a 32-bit register. With a multiplier ``u`` in 1..15
the byte wanted is ``code * u = nibble * u - 8 u``. In four bytes at once, ``t = nibbles * u + (128 - 8 u)``
in every byte is one multiply-add with no carry between bytes, since ``8 <= 128 + code * u <= 248``; flipping
the top bits then takes the 128 off in two's complement. The same holds for ``u`` in -15..-1, whose products
are negative on the way: what counts is the sum, modulo 2^32. Without a multiplier the nibble moved to the
upper half of its byte, top bit flipped, is ``16 * code``: one shift and one logic operation, and the
accumulator is divided by 16 at the end, exactly.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ._triton import ceil_div, tl, triton
from .operation import Constraints, operation

__all__ = [
    "CODE_MAX",
    "CODE_MIN",
    "MULTIPLIER_MAX",
    "chunk_words",
    "dequantize",
    "float_bytes",
    "float_codes",
    "float_nibbles",
    "group_size_of",
    "pack_block",
    "pack_int4",
    "prepared_unpack",
    "scaled_high",
    "scaled_low",
    "sixteenfold_high",
    "sixteenfold_low",
    "supports_words",
    "unpack",
    "unpack_int4",
    "weight_operand",
    "weight_sizes",
]

CODE_MIN = -8
CODE_MAX = 7
MULTIPLIER_MAX = 15
"""Largest multiplier of a group of weights, in magnitude: a code times it fits into int8."""
_NIBBLE_OFFSET = 8


def pack_block(in_features: int) -> int:
    """Channels in one packing block: ``gcd(in_features, 128)``; ``in_features`` must be even."""
    if in_features < 2 or in_features % 2:
        raise ValueError(f"INT4 packing needs an even number of input channels, got {in_features}")
    return math.gcd(in_features, 128)


def pack_int4(codes: Tensor) -> Tensor:
    """Pack signed codes.

    Args:
        codes: ``[out, in]`` of any integer dtype, every value in [-8, 7].

    Returns:
        uint8 ``[out, in/2]``.

    Raises:
        ValueError: a code is out of range, or ``in`` is odd.
    """
    out_features, in_features = codes.shape
    half = pack_block(in_features) // 2
    if codes.numel() and (int(codes.min()) < CODE_MIN or int(codes.max()) > CODE_MAX):
        raise ValueError(f"codes must lie in [{CODE_MIN}, {CODE_MAX}]")
    nibbles = (codes.to(torch.int16) + _NIBBLE_OFFSET).to(torch.uint8).view(out_features, -1, 2, half)
    return (nibbles[:, :, 0] | (nibbles[:, :, 1] << 4)).reshape(out_features, in_features // 2)


def unpack_int4(packed: Tensor) -> Tensor:
    """Undo :func:`pack_int4`: uint8 ``[out, in/2]`` to int8 codes ``[out, in]``."""
    out_features, half_features = packed.shape
    half = pack_block(2 * half_features) // 2
    blocks = packed.view(out_features, half_features // half, 1, half)
    nibbles = torch.cat((blocks & 0xF, blocks >> 4), dim=2)
    return (nibbles.view(torch.int8) - _NIBBLE_OFFSET).reshape(out_features, 2 * half_features)


def weight_sizes(packed: Tensor, multiplier: Tensor | None) -> tuple[tuple[str, int], ...]:
    """The sizes of one or more packed weights ``[..., out, in/2]`` that a kernel may constrain."""
    in_features = 2 * packed.shape[-1]
    sizes = (("in_features", in_features), ("out_features", packed.shape[-2]))
    if multiplier is None:
        return sizes
    return (*sizes, ("weight_group_size", in_features // multiplier.shape[-1]))


def _fake(packed: Tensor, multiplier: Tensor | None) -> Tensor:
    return packed.new_empty((packed.shape[0], 2 * packed.shape[1]), dtype=torch.int8)


@operation(
    fake=_fake,
    sizes=weight_sizes,
    typical={"in_features": 4096, "out_features": 4096, "weight_group_size": 32},
)
def weight_operand(packed: Tensor, multiplier: Tensor | None = None) -> Tensor:
    """The int8 right-hand side of the integer product: codes, times their group's multiplier.

    Args:
        packed: uint8 ``[out, in/2]`` from :func:`pack_int4`.
        multiplier: ``[out, in/group]``, uint8 in 1..15 or int8 in ±1..±15; or None.

    Returns:
        int8 ``[out, in]`` in [-120, 120]: exact, since ``|code * multiplier| <= 8 * 15``.
    """
    codes = unpack_int4(packed)
    if multiplier is None:
        return codes
    out_features, in_features = codes.shape
    groups = multiplier.shape[1]
    scaled = codes.view(out_features, groups, -1) * multiplier.view(torch.int8).unsqueeze(-1)
    return scaled.view(out_features, in_features)


# 0xF7F7F7F8 is -8 in every byte: -0x08080808.
_SCALED = """
{{
.reg .b32 t, u, c;
{extract}
prmt.b32 u, $2, 0, 0x8880;
mad.lo.u32 c, u, 0xF7F7F7F8, 0x80808080;
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
    """``code * multiplier`` of the low nibbles as int8; uint8 ``packed`` and ``multiplier``, uint8 or int8,
    of one shape.

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


# Four codes become floats in two registers. A code's bits in the mantissa of a power of two, 2^7 or 2^10, are
# that power plus the code; one multiply-add takes the power away and applies the multiplier, exactly.
_NIBBLES = """
{{
.reg .b32 t, p;
and.b32 t, $4, 0x0F0F0F0F;
prmt.b32 p, t, {power}, 0x4140;
fma.rn.{type}x2 $0, p, {low0};
prmt.b32 p, t, {power}, 0x4342;
fma.rn.{type}x2 $1, p, {low1};
shr.u32 t, $4, 4;
and.b32 t, t, 0x0F0F0F0F;
prmt.b32 p, t, {power}, 0x4140;
fma.rn.{type}x2 $2, p, {high0};
prmt.b32 p, t, {power}, 0x4342;
fma.rn.{type}x2 $3, p, {high1};
}}
"""
_BFLOAT16 = {"type": "bf16", "power": "0x43434343"}
_FLOAT16 = {"type": "f16", "power": "0x64646464"}
_MULTIPLIED = {"low0": "$5, $9", "low1": "$6, $10", "high0": "$7, $11", "high1": "$8, $12"}
_BFLOAT16_NIBBLES_SCALED = tl.constexpr(_NIBBLES.format(**_BFLOAT16, **_MULTIPLIED))
_FLOAT16_NIBBLES_SCALED = tl.constexpr(_NIBBLES.format(**_FLOAT16, **_MULTIPLIED))


def _same(addend: str) -> dict[str, str]:
    return dict.fromkeys(_MULTIPLIED, addend)


# One and -(2^7 + 8), one and -(2^10 + 8).
_BFLOAT16_NIBBLES = tl.constexpr(
    _NIBBLES.format(**_BFLOAT16, **_same("one, offset")).replace(
        ".reg .b32 t, p;", ".reg .b32 t, p, one, offset; mov.b32 one, 0x3F803F80; mov.b32 offset, 0xC308C308;"
    )
)
_FLOAT16_NIBBLES = tl.constexpr(
    _NIBBLES.format(**_FLOAT16, **_same("one, offset")).replace(
        ".reg .b32 t, p;", ".reg .b32 t, p, one, offset; mov.b32 one, 0x3C003C00; mov.b32 offset, 0xE408E408;"
    )
)
# The sign bit of an int8 makes 2^7 into 2^8: 2^7 + (code & 127) less 2^7 or 2^8.
_BFLOAT16_BYTES = tl.constexpr("""
{
.reg .b32 p, a, b, minus;
mov.b32 minus, 0xBF80BF80;
prmt.b32 p, $2, 0x43434343, 0x4140;
and.b32 a, p, 0xFF7FFF7F;
and.b32 b, p, 0xFF80FF80;
fma.rn.bf16x2 $0, b, minus, a;
prmt.b32 p, $2, 0x43434343, 0x4342;
and.b32 a, p, 0xFF7FFF7F;
and.b32 b, p, 0xFF80FF80;
fma.rn.bf16x2 $1, b, minus, a;
}
""")
# 2^10 + (code + 128) less 1152.
_FLOAT16_BYTES = tl.constexpr("""
{
.reg .b32 t, p, one, offset;
mov.b32 one, 0x3C003C00;
mov.b32 offset, 0xE480E480;
xor.b32 t, $2, 0x80808080;
prmt.b32 p, t, 0x64646464, 0x4140;
fma.rn.f16x2 $0, p, one, offset;
prmt.b32 p, t, 0x64646464, 0x4342;
fma.rn.f16x2 $1, p, one, offset;
}
""")


@triton.jit
def float_nibbles(
    packed, low_multiplier, high_multiplier, dtype: tl.constexpr, GROUP: tl.constexpr, PTX: tl.constexpr
):
    """``code * multiplier`` of low and of high nibbles in ``dtype``, float16 or bfloat16; exact.

    uint8 ``packed`` and multipliers, uint8 or int8, have one shape, with ``GROUP`` 0 the latter are not
    looked at. Each byte has its own multiplier: four that share a register need not be of one row. Without
    ``PTX`` the results are float32, since the interpreter does not compute in bfloat16.
    """
    if not PTX:
        low = ((packed & 0xF).to(tl.int32) - 8).to(tl.float32)
        high = ((packed >> 4).to(tl.int32) - 8).to(tl.float32)
        if GROUP > 0:
            low *= low_multiplier.to(tl.float32)
            high *= high_multiplier.to(tl.float32)
    elif GROUP > 0:
        low_factor = low_multiplier.to(dtype)
        high_factor = high_multiplier.to(dtype)
        if dtype == tl.bfloat16:
            low, high = tl.inline_asm_elementwise(
                _BFLOAT16_NIBBLES_SCALED,
                "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
                [packed, low_factor, high_factor, low_factor * -136.0, high_factor * -136.0],
                dtype=(tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=4,
            )
        else:
            low, high = tl.inline_asm_elementwise(
                _FLOAT16_NIBBLES_SCALED,
                "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
                [packed, low_factor, high_factor, low_factor * -1032.0, high_factor * -1032.0],
                dtype=(tl.float16, tl.float16),
                is_pure=True,
                pack=4,
            )
    else:
        if dtype == tl.bfloat16:
            low, high = tl.inline_asm_elementwise(
                _BFLOAT16_NIBBLES,
                "=&r,=&r,=&r,=&r,r",
                [packed],
                dtype=(tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=4,
            )
        else:
            low, high = tl.inline_asm_elementwise(
                _FLOAT16_NIBBLES,
                "=&r,=&r,=&r,=&r,r",
                [packed],
                dtype=(tl.float16, tl.float16),
                is_pure=True,
                pack=4,
            )
    return low, high


@triton.jit
def float_bytes(codes, dtype: tl.constexpr, PTX: tl.constexpr):
    """int8 codes in ``dtype``, float16 or bfloat16; exact. Without ``PTX`` float32."""
    if not PTX:
        return codes.to(tl.float32)
    elif dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            _BFLOAT16_BYTES, "=&r,=&r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    else:
        return tl.inline_asm_elementwise(
            _FLOAT16_BYTES, "=&r,=&r,r", [codes], dtype=tl.float16, is_pure=True, pack=4
        )


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
    arithmetic in a word is that of the module's documentation.
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


def group_size_of(in_features: int, multiplier: Tensor | None) -> int:
    """Channels that a multiplier covers; 0 without multipliers, as kernels want it."""
    return 0 if multiplier is None else in_features // multiplier.shape[-1]


def supports_words(in_features: int, group_size: int) -> bool:
    """Whether rows split into 32-bit words that share a multiplier (``group_size`` 0: no multipliers)."""
    return in_features % 64 == 0 and (
        group_size == 0 or (group_size >= 16 and group_size & (group_size - 1) == 0)
    )


def chunk_words(group_size: int) -> int:
    """Words of a chunk whose low nibbles share a multiplier, and whose high nibbles do."""
    return 4 if group_size == 16 else 8


def prepared_unpack(
    packed: Tensor, multiplier: Tensor | None, unpacked: Tensor | None = None
) -> Callable[[], Tensor]:
    """What gives :func:`weight_operand` of one weight: ``unpacked``, where it is kept, else by a kernel."""
    if unpacked is not None:
        return lambda: unpacked
    packed = packed.contiguous()
    multiplier = None if multiplier is None else multiplier.contiguous()
    (out_features, row_bytes), device = packed.shape, packed.device
    in_features = 2 * row_bytes
    group_size = group_size_of(in_features, multiplier)
    if not supports_words(in_features, group_size):
        return functools.partial(dequantize, packed, multiplier, None, torch.int8)  # Adds no frame.
    words = chunk_words(group_size)
    rows, chunks = 4, 256 // words
    grid = ceil_div(out_features, rows), ceil_div(in_features // 8, chunks * words)
    packed_words, half = packed.view(torch.int32), pack_block(in_features) // 2
    multipliers = packed if multiplier is None else multiplier

    def run() -> Tensor:
        out = torch.empty(out_features, in_features, dtype=torch.int8, device=device)
        unpack_words_kernel[grid](
            packed_words,
            multipliers,
            out.view(torch.int32),
            out_features,
            in_features,
            half,
            group_size,
            words,
            rows,
            chunks,
            num_warps=4,
        )
        return out

    return run


@weight_operand.kernel("triton", Constraints.on_gpu())
def unpack(packed: Tensor, multiplier: Tensor | None) -> Tensor:
    """The kernel of :func:`weight_operand`."""
    return prepared_unpack(packed, multiplier)()


def dequantize(
    packed: Tensor, multiplier: Tensor | None, weight_scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """A packed weight ``[out, in]`` of any size in ``dtype``, by a Triton kernel; without scales in int8."""
    rows, row_bytes = packed.shape
    out = torch.empty(rows, 2 * row_bytes, dtype=dtype, device=packed.device)
    unpack_kernel[(rows, ceil_div(row_bytes, 1024))](
        packed,
        packed if multiplier is None else multiplier,
        packed if weight_scale is None else weight_scale,
        out,
        rows,
        row_bytes,
        HALF=pack_block(2 * row_bytes) // 2,
        GROUP=group_size_of(2 * row_bytes, multiplier),
        DEQUANTIZE=weight_scale is not None,
        BLOCK_ROWS=1,
        BLOCK_BYTES=1024,
        num_warps=4,
    )
    return out
