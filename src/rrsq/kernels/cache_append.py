"""Quantization of new keys and values into a cache, in place."""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import ceil_div, next_power_of_two, tl, triton
from .cache import encode_cache, offset_keys, rope_of_offset, rotated_halves
from .operation import Constraints, operation

__all__ = ["cache_append"]

_TILE = 16
_WARPS = 4
_ROUNDER = tl.constexpr(12582912.0)
_HALF_MAX = tl.constexpr(65504.0)
_HALF_TINY = tl.constexpr(2.0**-24)


def _fake(*_: object) -> None:
    return None


def _sizes(keys: Tensor, *_: object) -> tuple[tuple[str, int], ...]:
    return (("head_dim", keys.shape[3]),)


@operation(
    fake=_fake,
    sizes=_sizes,
    dtypes=("keys",),
    mutates=("key_codes", "key_scale", "key_minimum", "value_codes", "value_scale", "value_minimum"),
    typical={"keys": torch.bfloat16, "head_dim": 128},
    activations=2,
)
def cache_append(
    keys: Tensor,
    values: Tensor,
    key_codes: Tensor,
    key_scale: Tensor,
    key_minimum: Tensor | None,
    value_codes: Tensor,
    value_scale: Tensor,
    value_minimum: Tensor | None,
    slots: Tensor,
    positions: Tensor | None,
    key_signs: Tensor | None,
    value_signs: Tensor | None,
    key_offset: Tensor | None,
    key_sink: Tensor | None,
    key_balance: Tensor | None,
    value_offset: Tensor | None,
    frequencies: Tensor | None,
    rope_scale: float,
    keys_signed: bool = False,
    values_signed: bool = False,
) -> None:
    """Store ``encode_cache((k - RoPE_p(mu)) D H)`` and of ``v`` the same without ``D``.

    See :mod:`rrsq.kernels.cache`.

    Args:
        keys, values: ``[batch, kv_heads, tokens, head_dim]``, any strides; keys after RoPE.
        key_codes, key_scale, key_minimum, value_codes, value_scale, value_minimum: see
            :class:`~rrsq.kernels.cache.CachePages`; written to.
        slots: where the tokens go. int32 ``[1]``: token ``t`` of sequence ``b`` to row ``(slots + t) %
            block_size`` of block ``b``, with no more tokens than rows. int64 ``[batch * tokens]``: to row
            ``slots % block_size`` of block ``slots // block_size``; nowhere if it is negative.
        positions: with ``[1]`` slots, int32 ``[batch]``, what to add to ``slots + t`` for the position, or
            None for 0; else int ``[batch * tokens]``, the positions.
        key_signs, value_signs: int8 ``[head_dim, head_dim]`` of ±1, ``sqrt(head_dim) H``, or None.
        key_offset, value_offset: float32 ``[kv_heads, head_dim]``, or None.
        key_sink, frequencies, rope_scale: see :func:`~rrsq.kernels.cache.offset_keys`.
        key_balance: float32 ``[kv_heads, head_dim]``, powers of two: ``D``, which queries are divided by; or
            None for 1.
        keys_signed, values_signed: whether scales have a sign, see :func:`~rrsq.kernels.cache.encode_cache`.
    """
    batch, _, tokens, head_dim = keys.shape
    block_size = key_codes.shape[2]
    if slots.shape[0] == 1 and slots.dtype == torch.int32:
        token = (slots + torch.arange(tokens, device=keys.device)).expand(batch, tokens)
        place = token % block_size
        where = token if positions is None else token + positions.unsqueeze(1)
        block = torch.arange(batch, device=keys.device).unsqueeze(1).expand(batch, tokens)
    else:
        assert positions is not None
        block = (slots // block_size).view(batch, tokens)
        place = (slots % block_size).view(batch, tokens)
        where = positions.view(batch, tokens)
    x = keys.float()
    if key_offset is not None:
        x = x - offset_keys(key_offset, key_sink, where, frequencies, rope_scale)
    if key_balance is not None:
        x = x * key_balance[None, :, None, :]
    if key_signs is not None:
        x = x @ (key_signs.float() * head_dim**-0.5)
    y = values.float()
    if value_offset is not None:
        y = y - value_offset[None, :, None, :]
    if value_signs is not None:
        y = y @ (value_signs.float() * head_dim**-0.5)
    kept = (block >= 0).flatten()
    index = block.flatten()[kept], place.flatten()[kept]
    for tensor, stored, signed in (
        (x, (key_codes, key_scale, key_minimum), keys_signed),
        (y, (value_codes, value_scale, value_minimum), values_signed),
    ):
        bits, groups = stored[0].shape[-1] * 8 // head_dim, stored[1].shape[-1]
        new = encode_cache(tensor, bits, head_dim // groups, stored[2] is not None, signed)
        for into, part in zip(stored, new, strict=True):
            if into is not None and part is not None:
                into[index[0], :, index[1]] = part.transpose(1, 2).flatten(0, 1)[kept]


@triton.jit
def _codes_of(x, scale, low, BITS: tl.constexpr, MINIMUM: tl.constexpr, SIGNED: tl.constexpr):
    """Codes as stored, int32; ``scale`` and ``low`` have the shape of ``x``."""
    if MINIMUM:
        number = tl.div_rn(x - low, scale)
        number = tl.minimum(tl.maximum(number, 0.0), 2.0**BITS - 1)
        return (number + _ROUNDER).to(tl.int32, bitcast=True) & 0xFF
    top: tl.constexpr = 2.0 ** (BITS - 1) - 1
    bottom: tl.constexpr = -top - 1 if SIGNED else -top
    number = tl.minimum(tl.maximum(tl.div_rn(x, scale), bottom), top)
    return ((number + _ROUNDER).to(tl.int32, bitcast=True) + 2 ** (BITS - 1)) & 0xFF


@triton.jit
def _grid(least, most, spoilt, BITS: tl.constexpr, MINIMUM: tl.constexpr, SIGNED: tl.constexpr):
    """Scales and minima of groups, float16, of their extremes."""
    floor = tl.zeros(most.shape, tl.float16)
    if MINIMUM:
        floor = tl.minimum(tl.maximum(least, -_HALF_MAX), _HALF_MAX).to(tl.float16)
        scale = tl.div_rn(most - floor.to(tl.float32), tl.full(most.shape, 2.0**BITS - 1, tl.float32))
    elif SIGNED:
        scale = tl.maximum(most, -least) * 2.0 ** (1 - BITS)
    else:
        scale = tl.div_rn(tl.maximum(most, -least), tl.full(most.shape, 2.0 ** (BITS - 1) - 0.5, tl.float32))
    scale = tl.minimum(tl.maximum(scale, _HALF_TINY), _HALF_MAX)
    if SIGNED:
        scale = tl.where(most >= -least, -scale, scale)
    return tl.where(spoilt == 0, scale, float("nan")).to(tl.float16), floor


@triton.jit
def _encoded_half(
    x,
    scale_pointer,
    minimum_pointer,
    scale_rows,
    real,
    first,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    TILE: tl.constexpr,
    MINIMUM: tl.constexpr,
    SIGNED: tl.constexpr,
):
    """Codes ``[TILE, HALF]`` of half of the channels, which is of whole groups from ``first`` on."""
    x = x.reshape(TILE, HALF // GROUP, GROUP)
    # NaN is passed over by minima and maxima, and comes in last.
    spoilt = tl.max((x != x).to(tl.int32), 2)
    scale, floor = _grid(tl.min(x, 2), tl.max(x, 2), spoilt, BITS, MINIMUM, SIGNED)
    place = scale_rows[:, None] + (first + tl.arange(0, HALF // GROUP))[None, :]
    tl.store(scale_pointer + place, scale, mask=real[:, None])
    if MINIMUM:
        tl.store(minimum_pointer + place, floor, mask=real[:, None])
    wide = tl.broadcast_to(scale.to(tl.float32)[:, :, None], (TILE, HALF // GROUP, GROUP))
    codes = _codes_of(x, wide, floor.to(tl.float32)[:, :, None], BITS, MINIMUM, SIGNED)
    return codes.reshape(TILE, HALF)


@triton.jit
def _store_encoded(
    low,
    high,
    codes_pointer,
    scale_pointer,
    minimum_pointer,
    code_rows,
    scale_rows,
    real,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    HALF: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
    MINIMUM: tl.constexpr,
    SIGNED: tl.constexpr,
):
    """:func:`~rrsq.kernels.cache.encode_cache` of the two halves of the channels of a tile of tokens."""
    GROUP: tl.constexpr = 2 * HALF // GROUPS
    channel = tl.arange(0, PADDED)
    inside = channel < HALF
    if HALF == PADDED and HALF % GROUP == 0:
        low_codes = _encoded_half(
            low, scale_pointer, minimum_pointer, scale_rows, real, 0, BITS, GROUP, HALF, TILE, MINIMUM, SIGNED
        )
        high_codes = _encoded_half(
            high, scale_pointer, minimum_pointer, scale_rows, real, HALF // GROUP,
            BITS, GROUP, HALF, TILE, MINIMUM, SIGNED,
        )  # fmt: skip
    else:
        of_low = channel // GROUP
        of_high = (channel + HALF) // GROUP
        low_scale = tl.full(low.shape, 1.0, tl.float32)
        high_scale = tl.full(low.shape, 1.0, tl.float32)
        low_floor = tl.zeros(low.shape, tl.float32)
        high_floor = tl.zeros(low.shape, tl.float32)
        for group in tl.static_range(GROUPS):
            in_low = (inside & (of_low == group))[None, :]
            in_high = (inside & (of_high == group))[None, :]
            spoilt = tl.max((in_low & (low != low)).to(tl.int32), 1) + tl.max(
                (in_high & (high != high)).to(tl.int32), 1
            )
            least = tl.minimum(
                tl.min(tl.where(in_low, low, float("inf")), 1),
                tl.min(tl.where(in_high, high, float("inf")), 1),
            )
            most = tl.maximum(
                tl.max(tl.where(in_low, low, float("-inf")), 1),
                tl.max(tl.where(in_high, high, float("-inf")), 1),
            )
            scale, floor = _grid(least, most, spoilt, BITS, MINIMUM, SIGNED)
            tl.store(scale_pointer + scale_rows + group, scale, mask=real)
            if MINIMUM:
                tl.store(minimum_pointer + scale_rows + group, floor, mask=real)
                low_floor = tl.where(in_low, floor.to(tl.float32)[:, None], low_floor)
                high_floor = tl.where(in_high, floor.to(tl.float32)[:, None], high_floor)
            low_scale = tl.where(in_low, scale.to(tl.float32)[:, None], low_scale)
            high_scale = tl.where(in_high, scale.to(tl.float32)[:, None], high_scale)
        low_codes = _codes_of(low, low_scale, low_floor, BITS, MINIMUM, SIGNED)
        high_codes = _codes_of(high, high_scale, high_floor, BITS, MINIMUM, SIGNED)
    place = codes_pointer + code_rows[:, None] + channel[None, :]
    present = real[:, None] & inside[None, :]
    if BITS == 4:
        tl.store(place, (low_codes & 0xF | (high_codes & 0xF) << 4).to(tl.uint8), mask=present)
    else:
        tl.store(place, low_codes.to(tl.uint8), mask=present)
        tl.store(place + HALF, high_codes.to(tl.uint8), mask=present)


@triton.jit
def _append_kernel(
    keys,
    values,
    key_codes,
    key_scale,
    key_minimum,
    value_codes,
    value_scale,
    value_minimum,
    slots,
    positions,
    key_signs,
    value_signs,
    key_offset,
    key_sink,
    key_balance,
    value_offset,
    frequencies,
    rope_scale,
    tokens,
    rows,
    keys_stride_batch,
    keys_stride_head,
    keys_stride_token,
    values_stride_batch,
    values_stride_head,
    values_stride_token,
    key_stride_block,
    key_stride_head,
    key_stride_token,
    key_scale_stride_block,
    key_scale_stride_head,
    key_scale_stride_token,
    value_stride_block,
    value_stride_head,
    value_stride_token,
    value_scale_stride_block,
    value_scale_stride_head,
    value_scale_stride_token,
    BLOCK_SIZE: tl.constexpr,
    LISTED: tl.constexpr,
    SHIFTED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    KEY_BITS: tl.constexpr,
    KEY_GROUPS: tl.constexpr,
    KEY_MINIMUM: tl.constexpr,
    KEY_SIGNED: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    VALUE_MINIMUM: tl.constexpr,
    VALUE_SIGNED: tl.constexpr,
    KEYS_ROTATED: tl.constexpr,
    VALUES_ROTATED: tl.constexpr,
    OFFSET: tl.constexpr,
    SINK: tl.constexpr,
    BALANCED: tl.constexpr,
    VALUE_OFFSET: tl.constexpr,
    PAIRS: tl.constexpr,
    TILE: tl.constexpr,
):
    """A tile of tokens of one head of one sequence; the second half of the programs has the values."""
    HALF: tl.constexpr = HEAD_DIM // 2
    heads = tl.num_programs(1) // 2
    head = tl.program_id(1) % heads
    batch = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    real = token < tokens
    if LISTED:
        slot = tl.load(slots + batch * tokens + token, mask=real, other=-1)
        real = real & (slot >= 0)
        slot = tl.where(real, slot, 0)
        block = (slot // BLOCK_SIZE).to(tl.int64)
        row = (slot % BLOCK_SIZE).to(tl.int32)
        position = tl.load(positions + batch * tokens + token, mask=real, other=0).to(tl.int32)
    else:
        position = tl.load(slots) + token
        row = position % rows
        block = batch + tl.zeros([TILE], tl.int64)
        if SHIFTED:
            position += tl.load(positions + batch)
    channel = tl.arange(0, PADDED)
    present = real[:, None] & (channel < HALF)[None, :]
    if tl.program_id(1) < heads:
        x = keys + batch * keys_stride_batch + head * keys_stride_head + token * keys_stride_token
        low = tl.load(x[:, None] + channel[None, :], mask=present, other=0.0).to(tl.float32)
        high = tl.load(x[:, None] + (channel + HALF)[None, :], mask=present, other=0.0).to(tl.float32)
        if OFFSET:
            mean = key_offset + head * HEAD_DIM
            sink = mean
            if SINK:
                sink = key_sink + head * HEAD_DIM
            base = position.to(tl.float64)
            low -= rope_of_offset(
                mean, sink, base, frequencies, rope_scale, 0, HALF, HEAD_DIM, PAIRS, PADDED, SINK
            )
            high -= rope_of_offset(
                mean, sink, base, frequencies, rope_scale, HALF, HALF, HEAD_DIM, PAIRS, PADDED, SINK
            )
        if BALANCED:
            balance = key_balance + head * HEAD_DIM + channel
            low *= tl.load(balance, mask=channel < HALF, other=1.0)[None, :]
            high *= tl.load(balance + HALF, mask=channel < HALF, other=1.0)[None, :]
        if KEYS_ROTATED:
            low, high = rotated_halves(low, high, key_signs, HALF, HEAD_DIM, PADDED)
        code_rows = block * key_stride_block + head * key_stride_head + row * key_stride_token
        scale_rows = (
            block * key_scale_stride_block + head * key_scale_stride_head + row * key_scale_stride_token
        )
        _store_encoded(
            low, high, key_codes, key_scale, key_minimum, code_rows, scale_rows, real,
            KEY_BITS, KEY_GROUPS, HALF, PADDED, TILE, KEY_MINIMUM, KEY_SIGNED,
        )  # fmt: skip
    else:
        x = values + batch * values_stride_batch + head * values_stride_head + token * values_stride_token
        low = tl.load(x[:, None] + channel[None, :], mask=present, other=0.0).to(tl.float32)
        high = tl.load(x[:, None] + (channel + HALF)[None, :], mask=present, other=0.0).to(tl.float32)
        if VALUE_OFFSET:
            means = value_offset + head * HEAD_DIM + channel
            low -= tl.load(means, mask=channel < HALF, other=0.0)[None, :]
            high -= tl.load(means + HALF, mask=channel < HALF, other=0.0)[None, :]
        if VALUES_ROTATED:
            low, high = rotated_halves(low, high, value_signs, HALF, HEAD_DIM, PADDED)
        code_rows = block * value_stride_block + head * value_stride_head + row * value_stride_token
        scale_rows = (
            block * value_scale_stride_block + head * value_scale_stride_head + row * value_scale_stride_token
        )
        _store_encoded(
            low, high, value_codes, value_scale, value_minimum, code_rows, scale_rows, real,
            VALUE_BITS, VALUE_GROUPS, HALF, PADDED, TILE, VALUE_MINIMUM, VALUE_SIGNED,
        )  # fmt: skip


@cache_append.kernel(
    "triton",
    Constraints.on_gpu(
        dtypes={"keys": frozenset({torch.float16, torch.bfloat16, torch.float32})},
        at_most={"head_dim": 256},
        divisible={"head_dim": 2},
    ),
)
def _launch(
    keys: Tensor,
    values: Tensor,
    key_codes: Tensor,
    key_scale: Tensor,
    key_minimum: Tensor | None,
    value_codes: Tensor,
    value_scale: Tensor,
    value_minimum: Tensor | None,
    slots: Tensor,
    positions: Tensor | None,
    key_signs: Tensor | None,
    value_signs: Tensor | None,
    key_offset: Tensor | None,
    key_sink: Tensor | None,
    key_balance: Tensor | None,
    value_offset: Tensor | None,
    frequencies: Tensor | None,
    rope_scale: float,
    keys_signed: bool = False,
    values_signed: bool = False,
) -> None:
    batch, kv_heads, tokens, head_dim = keys.shape
    if keys.numel() == 0:
        return
    keys = keys if keys.stride(3) == 1 else keys.contiguous()
    values = values if values.stride(3) == 1 else values.contiguous()
    listed = slots.dtype == torch.int64
    tile = min(_TILE, next_power_of_two(tokens))
    _append_kernel[(ceil_div(tokens, tile), 2 * kv_heads, batch)](
        keys,
        values,
        key_codes,
        key_scale,
        key_minimum,
        value_codes,
        value_scale,
        value_minimum,
        slots,
        positions,
        key_signs,
        value_signs,
        key_offset,
        key_sink,
        key_balance,
        value_offset,
        frequencies,
        rope_scale,
        tokens,
        key_codes.shape[2],
        *keys.stride()[:3],
        *values.stride()[:3],
        *key_codes.stride()[:3],
        *key_scale.stride()[:3],
        *value_codes.stride()[:3],
        *value_scale.stride()[:3],
        BLOCK_SIZE=key_codes.shape[2] if listed else 1,
        LISTED=listed,
        SHIFTED=positions is not None,
        HEAD_DIM=head_dim,
        PADDED=max(next_power_of_two(head_dim // 2), 16),
        KEY_BITS=key_codes.shape[-1] * 8 // head_dim,
        KEY_GROUPS=key_scale.shape[-1],
        KEY_MINIMUM=key_minimum is not None,
        KEY_SIGNED=keys_signed,
        VALUE_BITS=value_codes.shape[-1] * 8 // head_dim,
        VALUE_GROUPS=value_scale.shape[-1],
        VALUE_MINIMUM=value_minimum is not None,
        VALUE_SIGNED=values_signed,
        KEYS_ROTATED=key_signs is not None,
        VALUES_ROTATED=value_signs is not None,
        OFFSET=key_offset is not None,
        SINK=key_sink is not None,
        BALANCED=key_balance is not None,
        VALUE_OFFSET=value_offset is not None,
        PAIRS=0 if frequencies is None else frequencies.shape[0],
        TILE=tile,
        num_warps=_WARPS,
    )
