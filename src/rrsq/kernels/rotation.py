"""Online Hadamard rotation of a linear's input: exact to rounding, or to the bit in front of a quantizer.

Codes of 4 bits are chaotic: a value next to a rounding boundary that two kernels compute one unit in the last
place apart becomes another code, and some layers later every code is another. So the rotation in front of a
quantizer is defined to the bit (:func:`rotate_reproducibly`). ``R = kron(dense, sylvester(fast))`` is applied
as two products with ±1 matrices. The operand of each is taken to float16 relative to the largest magnitude of
its row (a token in the first product, ``fast`` channels in the second), by a power of two that puts this
magnitude into [2^-9, 2^-8). float16 then has no finer grid than 2^-24, and a sum of up to 256 such numbers
fits into the 24 bits of float32: it is exact in any order. What is lost is below 2^-12 of a value, or 2^-15
of its row's largest.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ._triton import processors, tl, triton
from .codes import largest_magnitude, multiplied_codes, round_to_code, scale_of
from .operation import Constraints, operation

__all__ = [
    "ACTIVATIONS",
    "LARGEST_FACTOR",
    "RotationShape",
    "RotationSplit",
    "hadamard_transform",
    "half_range",
    "prepared_rotation",
    "rotate_reproducibly",
    "rotation_shape",
    "rotation_sizes",
    "split_rotation",
    "sylvester",
    "to_half_range",
]

LARGEST_FACTOR = 256
"""Largest side of a factor: sums of more numbers are not exact."""
_DENSE_STEP = 256
_SMALLEST_FAST = 16
_SMALLEST_EXPONENT = 1 << 23
_LARGEST_EXPONENT = 244 << 23
_EXPONENTS = 245 << 23
_EXPONENT_BITS = 0x7F800000

ACTIVATIONS = Constraints.on_gpu(
    dtypes={"x": frozenset({torch.float16, torch.bfloat16, torch.float32})},
    at_least={"hadamard_columns": 16, "channels": 32},
    at_most={"hadamard_rows": 256, "channels": 32768, "group_size": 2048},
    power_of_two=frozenset({"group_size", "hadamard_columns"}),
)
"""What kernels that rotate or quantize activations can serve."""


def sylvester(order: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Sylvester's Hadamard matrix ``[order, order]`` of ±1; ``order`` is a power of two."""
    H = torch.ones(1, 1, dtype=dtype, device=device)
    while H.shape[0] < order:
        H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)), 0)
    return H


def rotation_sizes(
    channels: int, base: int | None, hadamard_block: int, inner: int
) -> tuple[tuple[str, int], ...]:
    """The sizes of a rotation that a kernel may constrain; nothing when there is no rotation.

    ``base`` is the order of the base matrix, None without a rotation.

    ``hadamard_rows`` and ``hadamard_columns``: a token seen as rows that need a dense product and contiguous
    columns that Sylvester's matrix mixes (``inner`` > 1: that are not mixed).
    """
    if base is None:
        return ()
    columns = hadamard_block // base if inner == 1 else inner
    return ("hadamard_rows", channels // columns), ("hadamard_columns", columns)


def _fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, dtype=torch.promote_types(x.dtype, torch.float32))


def _sizes(x: Tensor, base: Tensor, hadamard_block: int, inner: int) -> tuple[tuple[str, int], ...]:
    return ("channels", x.shape[-1]), *rotation_sizes(x.shape[-1], base.shape[0], hadamard_block, inner)


@operation(
    fake=_fake, sizes=_sizes, dtypes=("x",), typical={"x": torch.bfloat16, "channels": 4096}, rows=True
)
def hadamard_transform(x: Tensor, base: Tensor, hadamard_block: int, inner: int = 1) -> Tensor:
    """Rotate blocks of channels online: ``x @ R``, ``R`` orthonormal (QuaRot, arXiv 2404.00456, section 4).

    Each run of ``hadamard_block * inner`` channels is seen as ``[hadamard_block, inner]`` and mixed over its
    first index by ``kron(base, sylvester) / sqrt(hadamard_block)``; so ``R = kron(H, I_inner)`` in each run.
    ``inner`` is 1 for an ordinary rotation; the rotation across heads of ``o_proj``'s input has
    ``hadamard_block = heads`` and ``inner = head_dim``. NaN in a run makes all that it is mixed with NaN; a
    kernel may spread it over the whole token.

    Args:
        x: floating point ``[..., channels]``; ``channels`` is a multiple of ``hadamard_block * inner``.
        base: ``[k, k]`` of ±1, any dtype; ``hadamard_block / k`` is a power of two.
        hadamard_block: order of the Hadamard matrix.
        inner: channels between neighbours that are mixed.

    Returns:
        A tensor like ``x``, in float32 if ``x`` is of lower precision.
    """
    if inner == 1:
        return _rotated(x, base, hadamard_block)
    mixed = x.unflatten(-1, (-1, hadamard_block, inner)).transpose(-1, -2)
    return _rotated(mixed, base, hadamard_block).transpose(-1, -2).reshape(x.shape)


def _rotated(x: Tensor, base: Tensor, block: int) -> Tensor:
    """:func:`hadamard_transform` of neighbouring channels."""
    k = base.shape[0]
    power = block // k
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    shape = y.shape
    y = y.reshape(-1, k, power)
    step = min(power, _DENSE_STEP)
    inner = sylvester(step, y.dtype, y.device)
    y = (y.reshape(-1, step) @ inner).reshape(-1, k, power // step, step)
    if power > step:
        outer = sylvester(power // step, y.dtype, y.device)
        y = torch.matmul(outer, y)
    y = y.reshape(-1, k, power)
    if k > 1:
        y = torch.matmul(base.to(y.dtype).t(), y)
    return (y * (1.0 / math.sqrt(block))).reshape(shape)


@dataclass(frozen=True)
class RotationSplit:
    """A token seen as ``[dense, fast]``, and the two factors of its rotation."""

    base: int
    dense_power: int
    """The dense factor is ``kron(base matrix, sylvester(dense_power))``, block-diagonal over ``dense``."""
    dense: int
    fast: int
    mix_fast: bool
    """Whether the columns are mixed too."""


@functools.lru_cache(maxsize=256)
def split_rotation(channels: int, base: int, block: int, inner: int) -> RotationSplit:
    """Split a rotation of ``channels`` by Hadamard matrices of order ``block = base * 2^p`` over every
    ``inner``-th.

    How much of the power of two joins the dense factor is what makes the products smallest on tensor cores,
    whose tiles are powers of two. With ``inner`` > 1, or a power below 16, all of the mixing is dense.
    """
    power = block // base
    rows = channels // (power * inner)
    if inner > 1 or power < _SMALLEST_FAST:
        return RotationSplit(base, power, rows * power, inner, False)
    candidates = [1 << p for p in range(power.bit_length()) if power >> p >= _SMALLEST_FAST]

    def cost(dense_power: int) -> tuple[bool, int]:
        size = 1 << (rows * dense_power - 1).bit_length()
        fast = power // dense_power
        return max(size, fast) > LARGEST_FACTOR, size * fast * (size + fast)

    dense_power = min(candidates, key=cost)
    return RotationSplit(base, dense_power, rows * dense_power, power // dense_power, True)


def _dense_factor(base: Tensor, split: RotationSplit) -> Tensor:
    """``kron(base, sylvester(dense_power))``, float32 on the device of ``base``."""
    return torch.kron(base.float(), sylvester(split.dense_power, torch.float32, base.device))


def rotate_reproducibly(x: Tensor, base: Tensor, block: int, inner: int) -> Tensor:
    """``x @ R``, float32, with the roundings of the module's documentation.

    Args:
        x: ``[tokens, channels]``, floating point.
        base: ``[k, k]`` of ±1.
        block: order of the Hadamard matrices.
        inner: they mix every ``inner``-th channel.

    Returns:
        float32 ``[tokens, channels]``.
    """
    tokens, channels = x.shape
    split = split_rotation(channels, base.shape[0], block, inner)
    mixing = _dense_factor(base, split)
    down, up = half_range(x.float().abs().amax(1).view(tokens, 1, 1, 1))
    y = x.float().view(tokens, -1, mixing.shape[0], split.fast)
    y = torch.matmul(mixing.t(), (y * down).half().float())
    if split.mix_fast:
        down, row_up = half_range(y.abs().amax(-1, keepdim=True))
        y = torch.matmul((y * down).half().float(), sylvester(split.fast, torch.float32, y.device))
        up = up * row_up
    return (y * (up * (1.0 / math.sqrt(block)))).view(tokens, channels)


def half_range(largest: Tensor) -> tuple[Tensor, Tensor]:
    """Powers of two that take ``largest`` (float32 >= 0) into [2^-9, 2^-8), and back."""
    exponent = largest.contiguous().view(torch.int32) & _EXPONENT_BITS
    exponent = exponent.clamp(_SMALLEST_EXPONENT, _LARGEST_EXPONENT)
    return (_EXPONENTS - exponent).view(torch.float32), (exponent + (9 << 23)).view(torch.float32)


# How a split rotation runs on a GPU.
_LARGEST_WHOLE = 128
_KERNEL_DENSE_STEP = 64
_SMALLEST_DOT = 16
_SMALL_TOKEN = 8192


class _Occupancy(TypedDict):
    warps: int
    programs: int
    registers: int | None
    stages: int


@dataclass(frozen=True)
class RotationShape:
    """A token seen as ``[dense, fast]``; see :func:`_rotation_kernel`."""

    split: RotationSplit
    dense_padded: int
    """The next power of two, at least 16."""
    dense_step: int
    """Rows of the dense factor taken at a time."""
    warps: int
    programs: int
    """Programs a multiprocessor holds at a time."""
    registers: int | None
    """Registers a thread is held to, so that they fit; None: no limit."""
    stages: int
    """Tokens on their way to shared memory."""


def _occupancy(elements: int, whole: bool) -> _Occupancy:
    """What was fastest on an H200, by the size of a token and whether the dense factor is read at once."""
    if elements <= _SMALL_TOKEN:
        return _Occupancy(warps=4, programs=4, registers=None, stages=3)
    if elements <= 2 * _SMALL_TOKEN:
        if whole:
            return _Occupancy(warps=8, programs=2, registers=128, stages=1)
        return _Occupancy(warps=4, programs=4, registers=None, stages=2)
    if whole:
        return _Occupancy(warps=16, programs=1, registers=None, stages=1)
    return _Occupancy(warps=8, programs=1, registers=None, stages=3)


@functools.lru_cache(maxsize=256)
def rotation_shape(channels: int, base: int, block: int, inner: int) -> RotationShape:
    """How a rotation of ``channels`` by Hadamard matrices of order ``block`` over every ``inner``-th runs."""
    split = split_rotation(channels, base, block, inner)
    padded = max(1 << (split.dense - 1).bit_length(), _SMALLEST_DOT)
    whole = padded <= _LARGEST_WHOLE
    return RotationShape(
        split=split,
        dense_padded=padded,
        dense_step=padded if whole else _KERNEL_DENSE_STEP,
        **_occupancy(padded * split.fast, whole),
    )


_Factors = tuple[Tensor, Tensor]
_factors = WeakTensorKeyDictionary()


def _rotation_factors(base: Tensor, shape: RotationShape, dtype: torch.dtype) -> _Factors:
    """The dense and the fast factor of a rotation.

    They are kept for as long as ``base`` lives, which must not be changed in place. In a CUDA graph's capture
    factors that are not there yet are not kept either: their memory would be the graph's.

    Args:
        base: ``[k, k]`` of ±1.
        shape: how the rotation is factored.
        dtype: what the products take.

    Returns:
        ``dense`` ``[dense_padded, dense_padded]``, transposed and padded with zeros, and ``fast`` ``[fast,
        fast]``, both in ``dtype``.
    """
    known: dict[tuple[RotationShape, torch.dtype], _Factors] = _factors.setdefault(base, {})
    key = (shape, dtype)
    if key in known:
        return known[key]
    factors = _make_factors(base, shape, dtype)
    if base.device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return factors
        # Other streams may use them from now on.
        torch.cuda.current_stream(base.device).synchronize()
    known[key] = factors
    return factors


def _make_factors(base: Tensor, shape: RotationShape, dtype: torch.dtype) -> _Factors:
    split = shape.split
    mixing = _dense_factor(base, split)
    dense = base.new_zeros(shape.dense_padded, shape.dense_padded, dtype=dtype)
    dense[: split.dense, : split.dense] = torch.block_diag(*[mixing.t()] * (split.dense // mixing.shape[0]))
    return dense, sylvester(split.fast, dtype, base.device)


_BITS_OF_EXPONENT = tl.constexpr(0x7F800000)
_LEAST_EXPONENT = tl.constexpr(1 << 23)
_GREATEST_EXPONENT = tl.constexpr(244 << 23)
_SUM_OF_EXPONENTS = tl.constexpr(245 << 23)
_NINE = tl.constexpr(9 << 23)


@triton.jit
def _dot(a, b, accumulator, EXACT: tl.constexpr):
    if EXACT:
        return tl.dot(a, b, accumulator, input_precision="ieee")
    else:
        return tl.dot(a, b, accumulator)


@triton.jit
def to_half_range(largest):
    """Powers of two that take ``largest`` (float32 >= 0) into [2^-9, 2^-8), and back."""
    exponent = largest.to(tl.int32, bitcast=True) & _BITS_OF_EXPONENT
    exponent = tl.minimum(tl.maximum(exponent, _LEAST_EXPONENT), _GREATEST_EXPONENT)
    down = (-exponent + _SUM_OF_EXPONENTS).to(tl.float32, bitcast=True)
    up = (exponent + _NINE).to(tl.float32, bitcast=True)
    return down, up


@triton.jit
def _load_rows(pointer, row, column, DENSE: tl.constexpr, FAST: tl.constexpr):
    """Rows of a token, float32, zeros past the last."""
    x = tl.load(pointer + row[:, None] * FAST + column[None, :], mask=(row < DENSE)[:, None], other=0.0)
    return x.to(tl.float32)


@triton.jit(do_not_specialize=["tokens"])
def _rotation_kernel(
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
    """Rotate tokens in one pass; with ``QUANTIZE`` write their int8 operands and scales, else float32.

    A token is seen as ``[DENSE, FAST]``: a product from the left with ``dense = kron(base,
    sylvester(DENSE_POWER))`` (block-diagonal where the rotation is), then one from the right with Sylvester's
    matrix. Both run on the tensor cores with ±1 matrices that stay in shared memory while a program walks
    over its tokens. Operands are float16, rounded as :func:`rotate_reproducibly` does; with ``EXACT`` they
    are float32 and nothing is rounded.

    ``dense_pointer`` and ``fast_pointer``: see :func:`_rotation_factors`. ``DENSE_STEP`` equal to
    ``DENSE_PADDED``: the dense factor is read once a program; smaller: in steps, for each token.
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
                down, up = to_half_range(tl.max(tl.max(tl.abs(x), 1), 0))
                y = _dot(dense, (x * down).to(tl.float16), y, EXACT)
        else:
            largest = tl.zeros([DENSE_STEP], tl.float32)
            if not EXACT:
                for first in tl.range(0, DENSE, DENSE_STEP, num_stages=STAGES):
                    x = _load_rows(x_pointer + start, first + step_row, column, DENSE, FAST)
                    largest = tl.maximum(largest, tl.max(tl.abs(x), 1))
            down, up = to_half_range(tl.max(largest, 0))
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
                row_down, row_up = to_half_range(tl.max(tl.abs(y), 1))
                mixed = _dot((y * row_down[:, None]).to(tl.float16), fast, mixed, EXACT)
                y = mixed * (up * row_up * normalization)[:, None]
        elif EXACT:
            y = y * normalization
        else:
            y = y * (up * normalization)
        if QUANTIZE:
            if GROUP > 0:
                grouped = y.reshape(DENSE_PADDED * FAST // GROUP, GROUP)
                group_max = largest_magnitude(grouped, 1)
                scale = scale_of(largest_magnitude(group_max, 0), scale_factor)
                operand = multiplied_codes(grouped, group_max, scale, code_factor, CODE_MAX)
                operand = operand.reshape(DENSE_PADDED, FAST)
            else:
                scale = scale_of(largest_magnitude(largest_magnitude(y, 1), 0), scale_factor)
                operand = round_to_code(y * tl.div_rn(1.0, scale), CODE_MAX)
            tl.store(scale_pointer + token, scale)
            tl.store(out_pointer + start + offset, operand.to(tl.int8), mask=offset < CHANNELS)
        else:
            tl.store(out_pointer + start + offset, y, mask=offset < CHANNELS)


def prepared_rotation(
    x: Tensor,
    base: Tensor,
    hadamard_block: int,
    inner: int,
    factors: tuple[float, float] = (0.0, 0.0),
    code_limit: int = 0,
    group_size: int = 0,
) -> Callable[..., Tensor]:
    """A function of activations like ``x`` ``[..., channels]``, of any number of tokens but none.

    It returns them rotated, in float32; with a ``code_limit`` it is given ``out`` and ``scale`` too, for
    their int8 operand and its scale a token.
    """
    channels, quantize = x.shape[-1], code_limit > 0
    shape = rotation_shape(channels, base.shape[0], hadamard_block, inner)
    split = shape.split
    exact = not quantize and x.dtype == torch.float32
    dense, fast = _rotation_factors(base, shape, torch.float32 if exact else torch.float16)
    programs = shape.programs * processors(x.device)
    scale_factor, code_factor = factors
    normalization = 1.0 / math.sqrt(hadamard_block)
    limit = {} if shape.registers is None else {"maxnreg": shape.registers}

    def run(x: Tensor, out: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        x = x.contiguous()
        tokens = x.numel() // channels
        if out is None:
            out = torch.empty_like(x, dtype=torch.float32)
        _rotation_kernel[(min(tokens, programs),)](
            x,
            dense,
            fast,
            out,
            out if scale is None else scale,
            tokens,
            scale_factor,
            code_factor,
            normalization,
            CHANNELS=channels,
            DENSE=split.dense,
            DENSE_PADDED=shape.dense_padded,
            DENSE_STEP=shape.dense_step,
            FAST=split.fast,
            MIX_FAST=split.mix_fast,
            CODE_MAX=code_limit,
            GROUP=group_size,
            QUANTIZE=quantize,
            EXACT=exact,
            STAGES=shape.stages,
            num_warps=shape.warps,
            enable_fp_fusion=False,
            **limit,
        )
        return out

    return run


@hadamard_transform.kernel("triton", ACTIVATIONS)
def _launch(x: Tensor, base: Tensor, hadamard_block: int, inner: int) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 0:
        return torch.empty(x.shape, dtype=torch.float32, device=x.device)
    return prepared_rotation(rows, base, hadamard_block, inner)(rows).view(x.shape)


_launch.prepare = prepared_rotation  # type: ignore[attr-defined]
