"""Keys and values read out of a quantized cache, for attention that takes them in 16 bits: prefill."""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ._triton import ceil_div, next_power_of_two, tl, triton
from .cache import decode_cache, dequantized_halves, offset_keys, rope_of_offset, rotated_halves
from .operation import Constraints, operation

__all__ = ["cache_read", "read_kernel", "transposed"]

_TILE = 32


def _fake(like: Tensor, key_codes: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    batch, kv_heads, begin, end = like.shape[0], key_codes.shape[1], args[5], args[6]
    assert isinstance(begin, int)
    assert isinstance(end, int)
    shape = (batch, kv_heads, end - begin, like.shape[-1])
    return like.new_empty(shape), like.new_empty(shape)


def _sizes(like: Tensor, *_: object) -> tuple[tuple[str, int], ...]:
    return (("head_dim", like.shape[-1]),)


@operation(
    fake=_fake,
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
        key_signs, value_signs, key_offset, value_offset, frequencies, rope_scale: as they were stored with.

    Returns:
        Keys and values ``[batch, kv_heads, end - begin, head_dim]`` in the dtype of ``like``.
    """
    batch, head_dim = like.shape[0], like.shape[-1]
    slots = torch.arange(begin, end, device=like.device)
    read = []
    for codes, scale, minimum, signs in (
        (key_codes, key_scale, key_minimum, key_signs),
        (value_codes, value_scale, value_minimum, value_signs),
    ):
        parts = [None if x is None else _between(x, block_table, begin, end) for x in (codes, scale, minimum)]
        assert parts[0] is not None
        assert parts[1] is not None
        x = decode_cache(parts[0], parts[1], parts[2], codes.shape[-1] * 8 // head_dim)
        read.append(x if signs is None else x @ (signs.float().t() * head_dim**-0.5))
    keys, values = read
    if key_offset is not None:
        positions = slots.unsqueeze(0) + (0 if shift is None else shift.unsqueeze(1))
        keys = keys + offset_keys(key_offset, positions.expand(batch, -1), frequencies, rope_scale)
    if value_offset is not None:
        values = values + value_offset[None, :, None, :]
    return keys.to(like.dtype), values.to(like.dtype)


def _between(x: Tensor, block_table: Tensor | None, begin: int, end: int) -> Tensor:
    if block_table is not None:
        x = x[block_table.long().clamp(min=0)].transpose(1, 2).flatten(2, 3)
    return x[:, :, begin:end]


@triton.jit
def read_kernel(
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
        low16, high16 = dequantized_halves(
            key_codes, key_scale, key_minimum, code_rows, scale_rows, real,
            KEY_BITS, KEY_GROUPS, HEAD_DIM // KEY_GROUPS, HALF, TILE, PADDED, KEY_MINIMUM,
        )  # fmt: skip
        low = low16.to(tl.float32)
        high = high16.to(tl.float32)
        if KEYS_ROTATED:
            low, high = rotated_halves(low, high, key_signs, HALF, HEAD_DIM, PADDED)
        if OFFSET:
            mean = key_offset + head * HEAD_DIM
            if SHIFTED:
                position += tl.load(shift + batch)
            base = position.to(tl.float64)
            low += rope_of_offset(mean, base, frequencies, rope_scale, 0, HALF, HEAD_DIM, PAIRS, PADDED)
            high += rope_of_offset(mean, base, frequencies, rope_scale, HALF, HALF, HEAD_DIM, PAIRS, PADDED)
        tl.store(keys + place, low.to(keys.dtype.element_ty), mask=present)
        tl.store(keys + place + HALF, high.to(keys.dtype.element_ty), mask=present)
    else:
        code_rows = block * value_stride_block + head * value_stride_head + row * value_stride_token
        scale_rows = (
            block * value_scale_stride_block + head * value_scale_stride_head + row * value_scale_stride_token
        )
        low16, high16 = dequantized_halves(
            value_codes, value_scale, value_minimum, code_rows, scale_rows, real,
            VALUE_BITS, VALUE_GROUPS, HEAD_DIM // VALUE_GROUPS, HALF, TILE, PADDED, VALUE_MINIMUM,
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


_transposes = WeakTensorKeyDictionary()


def transposed(signs: Tensor) -> Tensor:
    """``signs.t()``, kept for as long as ``signs`` lives, which must not be changed in place.

    Not where a CUDA graph is captured: its memory would be the graph's.
    """
    known: Tensor | None = _transposes.get(signs)
    if known is None:
        known = signs.t().contiguous()
        if signs.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                return known
            # Other streams may use it from now on.
            torch.cuda.current_stream(signs.device).synchronize()
        _transposes[signs] = known
    return known


@cache_read.kernel(
    "triton",
    Constraints.on_gpu(
        dtypes={"like": frozenset({torch.float16, torch.bfloat16, torch.float32})},
        at_most={"head_dim": 256},
        divisible={"head_dim": 2},
    ),
)
def _launch(
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
    value_offset: Tensor | None,
    frequencies: Tensor | None,
    rope_scale: float,
) -> tuple[Tensor, Tensor]:
    batch, head_dim = like.shape[0], like.shape[-1]
    kv_heads = key_codes.shape[1]
    shape = (batch, kv_heads, end - begin, head_dim)
    keys = torch.empty(shape, dtype=like.dtype, device=like.device)
    values = torch.empty(shape, dtype=like.dtype, device=like.device)
    if keys.numel() == 0:
        return keys, values
    read_kernel[(ceil_div(end - begin, _TILE), 2 * kv_heads, batch)](
        key_codes,
        key_scale,
        key_minimum,
        value_codes,
        value_scale,
        value_minimum,
        block_table,
        shift,
        None if key_signs is None else transposed(key_signs),
        None if value_signs is None else transposed(value_signs),
        key_offset,
        value_offset,
        frequencies,
        keys,
        values,
        rope_scale,
        begin,
        end,
        0 if block_table is None else block_table.stride(0),
        *keys.stride()[:3],
        *key_codes.stride()[:3],
        *key_scale.stride()[:3],
        *value_codes.stride()[:3],
        *value_scale.stride()[:3],
        BLOCK_SIZE=key_codes.shape[2],
        PAGED=block_table is not None,
        LISTED=False,
        SHIFTED=shift is not None,
        HEAD_DIM=head_dim,
        PADDED=max(next_power_of_two(head_dim // 2), 16),
        KEY_BITS=key_codes.shape[-1] * 8 // head_dim,
        KEY_GROUPS=key_scale.shape[-1],
        KEY_MINIMUM=key_minimum is not None,
        VALUE_BITS=value_codes.shape[-1] * 8 // head_dim,
        VALUE_GROUPS=value_scale.shape[-1],
        VALUE_MINIMUM=value_minimum is not None,
        KEYS_ROTATED=key_signs is not None,
        VALUES_ROTATED=value_signs is not None,
        OFFSET=key_offset is not None,
        VALUE_OFFSET=value_offset is not None,
        PAIRS=0 if frequencies is None else frequencies.shape[0],
        TILE=_TILE,
        num_warps=4,
    )
    return keys, values
