"""Rotation and quantization of activations, a scale a token and integer multipliers for groups of channels.

Token ``i`` in group ``g`` has the scale ``a_i * m_ig`` with an integer ``m`` (arXiv 2405.04532 has these
multipliers for weights): the product gets the int8 operand ``code * m``, and only the rank-1 scale ``a_i`` is
left for its epilogue. Without groups ``m`` is 1 everywhere, which is ordinary per-token quantization.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from collections.abc import Callable

import torch
from torch import Tensor

from ._triton import ceil_div, next_power_of_two, tl, triton
from .codes import (
    MULTIPLIER_MAX,
    code_max,
    code_scale,
    integer_scales,
    largest_magnitude,
    multiplied_codes,
    round_to_code,
    scale_of,
)
from .operation import operation
from .rotation import ACTIVATIONS, prepared_rotation, rotate_reproducibly, rotation_sizes

__all__ = ["quantize_tokens"]

_WHOLE_ROW = 16384


def _fake(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


def _sizes(
    x: Tensor,
    bits: int,
    group_size: int | None,
    clip: float,
    base: Tensor | None,
    hadamard_block: int,
    hadamard_inner: int,
) -> tuple[tuple[str, int], ...]:
    channels = x.shape[1]
    order = None if base is None else base.shape[0]
    rotation = rotation_sizes(channels, order, hadamard_block, hadamard_inner)
    if group_size is None:
        return ("channels", channels), *rotation
    return ("channels", channels), ("group_size", group_size), *rotation


@operation(
    fake=_fake,
    sizes=_sizes,
    dtypes=("x",),
    typical={"x": torch.bfloat16, "channels": 4096, "group_size": 32},
    rows=True,
)
def quantize_tokens(
    x: Tensor,
    bits: int,
    group_size: int | None,
    clip: float,
    base: Tensor | None = None,
    hadamard_block: int = 0,
    hadamard_inner: int = 1,
) -> tuple[Tensor, Tensor]:
    """Rotate (where ``base`` is given) and quantize each token symmetrically.

    With groups, ``a`` and ``m`` are those of :func:`~rrsq.kernels.codes.integer_scales`, and ``code =
    round(x / (a_i m_ig))`` limited to ±c, ``c = code_max(bits)``. Without groups: ``a_i = clip * A_i / c``,
    ``A_i`` the token's largest magnitude, and ``m = 1``. The rotation is defined to the bit
    (:mod:`rrsq.kernels.rotation`); on a GPU all is one pass that reads ``x`` and writes the operand.

    Args:
        x: floating point ``[tokens, channels]``.
        bits: 4 or 8; groups need 4.
        group_size: channels a multiplier covers; divides ``channels``. None: one scale a token.
        clip: fraction of the largest magnitude that the largest code stands for, in (0, 1].
        base: ``[k, k]`` of ±1 (see :func:`~rrsq.kernels.hadamard_transform`), or None for no rotation.
        hadamard_block: order of the rotation; 0 without one.
        hadamard_inner: see ``inner`` of :func:`~rrsq.kernels.hadamard_transform`.

    Returns:
        ``operand`` int8 ``[tokens, channels]`` (``code * m``, in [-126, 126] with 4 bits) and ``scale``
        float32 ``[tokens]`` (``a``), with ``x ≈ operand * scale``. The scale of a token that holds NaN or an
        infinite value is NaN, and its operand anything.
    """
    if base is not None:
        x = rotate_reproducibly(x, base, hadamard_block, hadamard_inner)
    tokens, channels = x.shape
    c = code_max(bits)
    x = x.float()
    if group_size is None:
        scale = code_scale(x.abs().amax(1), clip / c)
        codes = (x * (1.0 / scale).unsqueeze(1)).round_().clamp_(-c, c)
        return codes.to(torch.int8), scale
    grouped = x.view(tokens, channels // group_size, group_size)
    scale, multiplier = integer_scales(grouped.abs().amax(2), bits, clip)
    inverse = 1.0 / (scale.unsqueeze(1) * multiplier)
    codes = (grouped * inverse.unsqueeze(2)).round_().clamp_(-c, c)
    operand = codes.mul_(multiplier.unsqueeze(2))
    return operand.to(torch.int8).view(tokens, channels), scale


@triton.jit
def _quantize_kernel(
    x_pointer,
    operand_pointer,
    scale_pointer,
    channels,
    scale_factor,
    code_factor,
    CODE_MAX: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One token, in ``BLOCKS`` pieces of ``BLOCK`` channels; with several pieces they are read again from the
    L1/L2.

    ``scale_factor`` float32: what the token's largest magnitude is multiplied by; ``code_factor``: clip /
    CODE_MAX. ``GROUP`` 0: no multipliers.
    """
    row = tl.program_id(0).to(tl.int64) * channels
    largest = tl.zeros([BLOCK], tl.int32)
    channel = tl.arange(0, BLOCK)
    x = tl.zeros([BLOCK], tl.float32)
    for block in tl.range(BLOCKS):
        offset = block * BLOCK + channel
        x = tl.load(x_pointer + row + offset, mask=offset < channels, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    scale = scale_of(tl.max(largest, 0).to(tl.float32, bitcast=True), scale_factor)
    tl.store(scale_pointer + tl.program_id(0), scale)
    for block in tl.range(BLOCKS):
        offset = block * BLOCK + channel
        if BLOCKS > 1:
            x = tl.load(x_pointer + row + offset, mask=offset < channels, other=0.0).to(tl.float32)
        if GROUP > 0:
            grouped = x.reshape(BLOCK // GROUP, GROUP)
            group_max = largest_magnitude(grouped, 1)
            operand = multiplied_codes(grouped, group_max, scale, code_factor, CODE_MAX).reshape(BLOCK)
        else:
            operand = round_to_code(x * tl.div_rn(1.0, scale), CODE_MAX)
        tl.store(operand_pointer + row + offset, operand.to(tl.int8), mask=offset < channels)


def _prepare(
    x: Tensor,
    bits: int,
    group_size: int | None,
    clip: float,
    base: Tensor | None,
    hadamard_block: int,
    hadamard_inner: int,
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """See :meth:`~rrsq.kernels.operation.Operation.prepare`; for any number of tokens."""
    channels, device = x.shape[-1], x.device
    limit, group = code_max(bits), group_size or 0
    scale_factor = clip / limit if group_size is None else clip / (limit * MULTIPLIER_MAX)
    code_factor = clip / limit
    if base is not None:
        factors = scale_factor, code_factor
        rotate = prepared_rotation(x, base, hadamard_block, hadamard_inner, factors, limit, group)

        def run_rotated(x: Tensor) -> tuple[Tensor, Tensor]:
            x = x.contiguous()
            operand = torch.empty_like(x, dtype=torch.int8)
            scale = torch.empty(x.numel() // channels, dtype=torch.float32, device=device)
            rotate(x, operand, scale)
            return operand, scale

        return run_rotated
    block = max(next_power_of_two(channels), 64)
    if block > _WHOLE_ROW:
        block = _WHOLE_ROW // 4
    blocks, warps = ceil_div(channels, block), min(max(block // 1024, 1), 16)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        tokens = x.numel() // channels
        operand = torch.empty_like(x, dtype=torch.int8)
        scale = torch.empty(tokens, dtype=torch.float32, device=device)
        _quantize_kernel[(tokens,)](
            x,
            operand,
            scale,
            channels,
            scale_factor,
            code_factor,
            CODE_MAX=limit,
            GROUP=group,
            BLOCK=block,
            BLOCKS=blocks,
            enable_fp_fusion=False,
            num_warps=warps,
        )
        return operand, scale

    return run


@quantize_tokens.kernel("triton", ACTIVATIONS)
def _launch(
    x: Tensor,
    bits: int,
    group_size: int | None,
    clip: float,
    base: Tensor | None,
    hadamard_block: int,
    hadamard_inner: int,
) -> tuple[Tensor, Tensor]:
    if x.shape[0] == 0:
        scale = torch.empty(0, dtype=torch.float32, device=x.device)
        return torch.empty(x.shape, dtype=torch.int8, device=x.device), scale
    return _prepare(x, bits, group_size, clip, base, hadamard_block, hadamard_inner)(x)


_launch.prepare = _prepare  # type: ignore[attr-defined]
