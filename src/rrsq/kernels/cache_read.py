"""Keys and values read out of a quantized cache, for attention that takes them in 16 bits: prefill.

A cache's own tokens from one to another, or a list of places: prompts of several lengths at once.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._triton import ceil_div, next_power_of_two, tl, triton
from .cache import (
    CachePages,
    decode_cache,
    dequantized_chunk,
    inverse_power,
    offset_keys,
    rope_of_offset,
    rotated_halves,
)
from .operation import Constraints, operation

__all__ = ["cache_gather", "cache_read"]

_TILE = 32


def _read_fake(like: Tensor, key_codes: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    batch, kv_heads, begin, end = like.shape[0], key_codes.shape[1], args[5], args[6]
    assert isinstance(begin, int)
    assert isinstance(end, int)
    shape = (batch, kv_heads, end - begin, like.shape[-1])
    return like.new_empty(shape), like.new_empty(shape)


def _gather_fake(like: Tensor, key_codes: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    slots = args[4]
    assert isinstance(slots, Tensor)
    shape = (slots.shape[0], key_codes.shape[1], like.shape[-1])
    return like.new_empty(shape), like.new_empty(shape)


def _sizes(like: Tensor, *_: object) -> tuple[tuple[str, int], ...]:
    return (("head_dim", like.shape[-1]),)


@operation(
    fake=_read_fake,
    sizes=_sizes,
    dtypes=("like",),
    typical={"like": torch.bfloat16, "head_dim": 128},
)
def cache_read(
    like: Tensor,
    key_codes: Tensor,
    key_scale: Tensor,
    key_minimum: Tensor | None,
    value_codes: Tensor,
    value_scale: Tensor,
    value_minimum: Tensor | None,
    begin: int,
    end: int,
    block_table: Tensor | None,
    shift: Tensor | None,
    key_signs: Tensor | None,
    value_signs: Tensor | None,
    key_offset: Tensor | None,
    key_sink: Tensor | None,
    key_balance: Tensor | None,
    value_offset: Tensor | None,
    frequencies: Tensor | None,
    rope_scale: float,
) -> tuple[Tensor, Tensor]:
    """Undo :func:`~rrsq.kernels.cache_append` for the cached tokens ``begin`` to ``end`` of each sequence.

    Args:
        like: ``[batch, ..., head_dim]`` of the dtype that is wanted; its values are not looked at.
        key_codes, key_scale, key_minimum, value_codes, value_scale, value_minimum: see
            :class:`~rrsq.kernels.cache.CachePages`.
        begin, end: tokens of a sequence.
        block_table: see :mod:`rrsq.kernels.cache`.
        shift: int32 ``[batch]``: cached token ``n`` is at position ``n + shift``; None for 0.
        key_signs, value_signs, key_offset, key_sink, key_balance, value_offset, frequencies, rope_scale: as
            they were stored with.

    Returns:
        Keys and values ``[batch, kv_heads, end - begin, head_dim]`` in the dtype of ``like``.
    """
    pages = CachePages(key_codes, key_scale, key_minimum, value_codes, value_scale, value_minimum)
    batch, head_dim = like.shape[0], like.shape[-1]
    keys, values = _decoded(
        pages, key_signs, value_signs, head_dim, lambda x: _between(x, block_table, begin, end)
    )
    if key_balance is not None:
        keys = keys / key_balance[None, :, None, :]
    if key_offset is not None:
        positions = torch.arange(begin, end, device=like.device).unsqueeze(0)
        positions = positions + (0 if shift is None else shift.unsqueeze(1))
        positions = positions.expand(batch, -1)
        keys = keys + offset_keys(key_offset, key_sink, positions, frequencies, rope_scale)
    if value_offset is not None:
        values = values + value_offset[None, :, None, :]
    return keys.to(like.dtype), values.to(like.dtype)


def _between(x: Tensor, block_table: Tensor | None, begin: int, end: int) -> Tensor:
    if block_table is not None:
        x = x[block_table.long().clamp(min=0)].transpose(1, 2).flatten(2, 3)
    return x[:, :, begin:end]


@operation(
    fake=_gather_fake,
    sizes=_sizes,
    dtypes=("like",),
    typical={"like": torch.bfloat16, "head_dim": 128},
)
def cache_gather(
    like: Tensor,
    key_codes: Tensor,
    key_scale: Tensor,
    key_minimum: Tensor | None,
    value_codes: Tensor,
    value_scale: Tensor,
    value_minimum: Tensor | None,
    slots: Tensor,
    positions: Tensor,
    key_signs: Tensor | None,
    value_signs: Tensor | None,
    key_offset: Tensor | None,
    key_sink: Tensor | None,
    key_balance: Tensor | None,
    value_offset: Tensor | None,
    frequencies: Tensor | None,
    rope_scale: float,
) -> tuple[Tensor, Tensor]:
    """Undo :func:`~rrsq.kernels.cache_append` for a list of cached tokens.

    Args:
        like: ``[..., head_dim]`` of the dtype that is wanted; its values are not looked at.
        key_codes, key_scale, key_minimum, value_codes, value_scale, value_minimum: see
            :class:`~rrsq.kernels.cache.CachePages`.
        slots: int64 ``[tokens]``, none negative: row ``slots % block_size`` of block ``slots // block_size``.
        positions: int ``[tokens]``, the tokens' positions.
        key_signs, value_signs, key_offset, key_sink, key_balance, value_offset, frequencies, rope_scale: as
            they were stored with.

    Returns:
        Keys and values ``[tokens, kv_heads, head_dim]`` in the dtype of ``like``.
    """
    pages = CachePages(key_codes, key_scale, key_minimum, value_codes, value_scale, value_minimum)
    block, row = slots // pages.block_size, slots % pages.block_size
    keys, values = _decoded(pages, key_signs, value_signs, like.shape[-1], lambda x: x[block, :, row])
    if key_balance is not None:
        keys = keys / key_balance
    if key_offset is not None:
        offset = offset_keys(key_offset, key_sink, positions.unsqueeze(0), frequencies, rope_scale)
        keys = keys + offset[0].transpose(0, 1)
    if value_offset is not None:
        values = values + value_offset
    return keys.to(like.dtype), values.to(like.dtype)


def _decoded(
    pages: CachePages,
    key_signs: Tensor | None,
    value_signs: Tensor | None,
    head_dim: int,
    chosen: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Keys and values of what is chosen, float32 ``[..., head_dim]``, without their offsets."""
    read = []
    for (codes, scale, minimum), signs in ((pages[:3], key_signs), (pages[3:], value_signs)):
        low = None if minimum is None else chosen(minimum)
        x = decode_cache(chosen(codes), chosen(scale), low, codes.shape[-1] * 8 // head_dim)
        read.append(x if signs is None else x @ (signs.float().t() * head_dim**-0.5))
    return read[0], read[1]


@triton.jit
def _kernel(
    key_codes,
    key_scale,
    key_minimum,
    value_codes,
    value_scale,
    value_minimum,
    table,
    shift,
    key_signs,
    value_signs,
    key_offset,
    key_sink,
    key_balance,
    value_offset,
    frequencies,
    keys,
    values,
    rope_scale,
    begin,
    end,
    table_stride,
    out_stride_batch,
    out_stride_head,
    out_stride_token,
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
    PAGED: tl.constexpr,
    LISTED: tl.constexpr,
    SHIFTED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    KEY_BITS: tl.constexpr,
    KEY_GROUPS: tl.constexpr,
    KEY_MINIMUM: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    VALUE_MINIMUM: tl.constexpr,
    KEYS_ROTATED: tl.constexpr,
    VALUES_ROTATED: tl.constexpr,
    OFFSET: tl.constexpr,
    SINK: tl.constexpr,
    BALANCED: tl.constexpr,
    VALUE_OFFSET: tl.constexpr,
    PAIRS: tl.constexpr,
    TILE: tl.constexpr,
):
    """A tile of tokens of one head of one sequence; the second half of the programs has the values.

    ``LISTED``: ``table`` has the slot of each token and ``shift`` its position.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    heads = tl.num_programs(1) // 2
    head = tl.program_id(1) % heads
    batch = tl.program_id(2).to(tl.int64)
    token = begin + tl.program_id(0) * TILE + tl.arange(0, TILE)
    real = token < end
    position = token
    if LISTED:
        slot = tl.load(table + token, mask=real, other=0)
        block = (slot // BLOCK_SIZE).to(tl.int64)
        row = (slot % BLOCK_SIZE).to(tl.int32)
        position = tl.load(shift + token, mask=real, other=0).to(tl.int32)
    elif PAGED:
        block = tl.load(table + batch * table_stride + token // BLOCK_SIZE, mask=real, other=0).to(tl.int64)
        row = token % BLOCK_SIZE
    else:
        block = batch
        row = token
    channel = tl.arange(0, PADDED)
    present = real[:, None] & (channel < HALF)[None, :]
    place = batch * out_stride_batch + head * out_stride_head
    place += (token - begin).to(tl.int64) * out_stride_token
    place = place[:, None] + channel[None, :]
    if tl.program_id(1) < heads:
        code_rows = block * key_stride_block + head * key_stride_head + row * key_stride_token
        scale_rows = (
            block * key_scale_stride_block + head * key_scale_stride_head + row * key_scale_stride_token
        )
        low16, high16 = dequantized_chunk(
            key_codes, key_scale, key_minimum, code_rows, scale_rows, real, 0,
            KEY_BITS, HEAD_DIM // KEY_GROUPS, HALF, PADDED, KEY_MINIMUM,
        )  # fmt: skip
        low = low16.to(tl.float32)
        high = high16.to(tl.float32)
        if KEYS_ROTATED:
            low, high = rotated_halves(low, high, key_signs, HALF, HEAD_DIM, PADDED)
        if BALANCED:
            balance = key_balance + head * HEAD_DIM + channel
            low *= inverse_power(tl.load(balance, mask=channel < HALF, other=1.0))[None, :]
            high *= inverse_power(tl.load(balance + HALF, mask=channel < HALF, other=1.0))[None, :]
        if OFFSET:
            mean = key_offset + head * HEAD_DIM
            sink = mean
            if SINK:
                sink = key_sink + head * HEAD_DIM
            if SHIFTED:
                position += tl.load(shift + batch)
            base = position.to(tl.float64)
            low += rope_of_offset(
                mean, sink, base, frequencies, rope_scale, 0, HALF, HEAD_DIM, PAIRS, PADDED, SINK
            )
            high += rope_of_offset(
                mean, sink, base, frequencies, rope_scale, HALF, HALF, HEAD_DIM, PAIRS, PADDED, SINK
            )
        tl.store(keys + place, low.to(keys.dtype.element_ty), mask=present)
        tl.store(keys + place + HALF, high.to(keys.dtype.element_ty), mask=present)
    else:
        code_rows = block * value_stride_block + head * value_stride_head + row * value_stride_token
        scale_rows = (
            block * value_scale_stride_block + head * value_scale_stride_head + row * value_scale_stride_token
        )
        low16, high16 = dequantized_chunk(
            value_codes, value_scale, value_minimum, code_rows, scale_rows, real, 0,
            VALUE_BITS, HEAD_DIM // VALUE_GROUPS, HALF, PADDED, VALUE_MINIMUM,
        )  # fmt: skip
        low = low16.to(tl.float32)
        high = high16.to(tl.float32)
        if VALUES_ROTATED:
            low, high = rotated_halves(low, high, value_signs, HALF, HEAD_DIM, PADDED)
        if VALUE_OFFSET:
            means = value_offset + head * HEAD_DIM + channel
            low += tl.load(means, mask=channel < HALF, other=0.0)[None, :]
            high += tl.load(means + HALF, mask=channel < HALF, other=0.0)[None, :]
        tl.store(values + place, low.to(values.dtype.element_ty), mask=present)
        tl.store(values + place + HALF, high.to(values.dtype.element_ty), mask=present)


def _transposed(signs: Tensor) -> Tensor:
    """``signs.t()``, kept at ``signs`` itself, which must not be changed in place.

    Not where a CUDA graph is captured: its memory would be the graph's.
    """
    known: Tensor | None = getattr(signs, "_rrsq_transposed", None)
    if known is None:
        known = signs.t().contiguous()
        if signs.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                return known
            # Other streams may use it from now on.
            torch.cuda.current_stream(signs.device).synchronize()
        signs._rrsq_transposed = known  # type: ignore[attr-defined]
    return known


def _call(
    pages: CachePages,
    constants: tuple[Any, ...],
    keys: Tensor,
    values: Tensor,
    places: tuple[Tensor | None, Tensor | None],
    tokens: tuple[int, int],
    strides: tuple[int, ...],
    listed: bool,
) -> tuple[tuple[int, int, int], tuple[Any, ...], dict[str, Any]]:
    """Grid, arguments and constants of a launch that fills ``keys`` and ``values`` ``[..., head_dim]``.

    Args:
        pages: what is read.
        constants: from ``key_signs`` on, of both operations.
        keys, values: for the result.
        places: block table and shift, or slots and positions.
        tokens: from which to which of each sequence, or of the list.
        strides: of sequence, head and token in the result.
        listed: places are a list.
    """
    key_codes, key_scale, key_minimum, value_codes, value_scale, value_minimum = pages
    signs, value_signs, offset, sink, balance, value_offset, frequencies, rope_scale = constants
    table, shift = places
    (begin, end), head_dim, kv_heads = tokens, keys.shape[-1], key_codes.shape[1]
    batch = 1 if listed else keys.shape[0]
    grid = ceil_div(end - begin, _TILE), 2 * kv_heads, batch
    arguments = (
        *pages,
        table,
        shift,
        None if signs is None else _transposed(signs),
        None if value_signs is None else _transposed(value_signs),
        offset,
        sink,
        balance,
        value_offset,
        frequencies,
        keys,
        values,
        rope_scale,
        begin,
        end,
        0 if table is None or listed else table.stride(0),
        *strides,
        *key_codes.stride()[:3],
        *key_scale.stride()[:3],
        *value_codes.stride()[:3],
        *value_scale.stride()[:3],
    )
    compiled = {
        "BLOCK_SIZE": pages.block_size,
        "PAGED": table is not None,
        "LISTED": listed,
        "SHIFTED": shift is not None and not listed,
        "HEAD_DIM": head_dim,
        "PADDED": max(next_power_of_two(head_dim // 2), 16),
        "KEY_BITS": key_codes.shape[-1] * 8 // head_dim,
        "KEY_GROUPS": key_scale.shape[-1],
        "KEY_MINIMUM": key_minimum is not None,
        "VALUE_BITS": value_codes.shape[-1] * 8 // head_dim,
        "VALUE_GROUPS": value_scale.shape[-1],
        "VALUE_MINIMUM": value_minimum is not None,
        "KEYS_ROTATED": signs is not None,
        "VALUES_ROTATED": value_signs is not None,
        "OFFSET": offset is not None,
        "SINK": sink is not None,
        "BALANCED": balance is not None,
        "VALUE_OFFSET": value_offset is not None,
        "PAIRS": 0 if frequencies is None else frequencies.shape[0],
        "TILE": _TILE,
        "num_warps": 4,
    }
    return grid, arguments, compiled


_CONSTRAINTS = Constraints.on_gpu(
    dtypes={"like": frozenset({torch.float16, torch.bfloat16, torch.float32})},
    at_most={"head_dim": 256},
    divisible={"head_dim": 2},
)


@cache_read.kernel("triton", _CONSTRAINTS)
def _launch_read(like: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    pages, (begin, end, table, shift), constants = CachePages(*args[:6]), args[6:10], args[10:]
    shape = like.shape[0], pages.key_codes.shape[1], end - begin, like.shape[-1]
    keys, values = (torch.empty(*shape, dtype=like.dtype, device=like.device) for _ in range(2))
    if keys.numel():
        grid, arguments, compiled = _call(
            pages, constants, keys, values, (table, shift), (begin, end), keys.stride()[:3], listed=False
        )
        _kernel[grid](*arguments, **compiled)
    return keys, values


@cache_gather.kernel("triton", _CONSTRAINTS)
def _launch_gather(like: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    pages, (slots, positions), constants = CachePages(*args[:6]), args[6:8], args[8:]
    shape = slots.shape[0], pages.key_codes.shape[1], like.shape[-1]
    keys, values = (torch.empty(*shape, dtype=like.dtype, device=like.device) for _ in range(2))
    if keys.numel():
        strides, tokens = (0, keys.stride(1), keys.stride(0)), (0, shape[0])
        grid, arguments, compiled = _call(
            pages, constants, keys, values, (slots, positions), tokens, strides, listed=True
        )
        _kernel[grid](*arguments, **compiled)
    return keys, values
