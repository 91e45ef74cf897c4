"""Keys and values read out of a quantized cache by a list of places: prompts of several lengths at once."""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import ceil_div, next_power_of_two
from .cache import decode_cache, offset_keys
from .cache_read import read_kernel, transposed
from .operation import Constraints, operation

__all__ = ["cache_gather"]

_TILE = 32


def _fake(like: Tensor, key_codes: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    slots = args[4]
    assert isinstance(slots, Tensor)
    shape = (slots.shape[0], key_codes.shape[1], like.shape[-1])
    return like.new_empty(shape), like.new_empty(shape)


def _sizes(like: Tensor, *_: object) -> tuple[tuple[str, int], ...]:
    return (("head_dim", like.shape[-1]),)


@operation(
    fake=_fake,
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
        key_signs, value_signs, key_offset, value_offset, frequencies, rope_scale: as they were stored with.

    Returns:
        Keys and values ``[tokens, kv_heads, head_dim]`` in the dtype of ``like``.
    """
    head_dim, block_size = like.shape[-1], key_codes.shape[2]
    block, row = slots // block_size, slots % block_size
    read = []
    for codes, scale, minimum, signs in (
        (key_codes, key_scale, key_minimum, key_signs),
        (value_codes, value_scale, value_minimum, value_signs),
    ):
        low = None if minimum is None else minimum[block, :, row]
        x = decode_cache(codes[block, :, row], scale[block, :, row], low, codes.shape[-1] * 8 // head_dim)
        read.append(x if signs is None else x @ (signs.float().t() * head_dim**-0.5))
    keys, values = read
    if key_offset is not None:
        offset = offset_keys(key_offset, positions.unsqueeze(0), frequencies, rope_scale)
        keys = keys + offset[0].transpose(0, 1)
    if value_offset is not None:
        values = values + value_offset
    return keys.to(like.dtype), values.to(like.dtype)


@cache_gather.kernel(
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
    slots: Tensor,
    positions: Tensor,
    key_signs: Tensor | None,
    value_signs: Tensor | None,
    key_offset: Tensor | None,
    value_offset: Tensor | None,
    frequencies: Tensor | None,
    rope_scale: float,
) -> tuple[Tensor, Tensor]:
    tokens, head_dim = slots.shape[0], like.shape[-1]
    kv_heads = key_codes.shape[1]
    shape = (tokens, kv_heads, head_dim)
    keys = torch.empty(shape, dtype=like.dtype, device=like.device)
    values = torch.empty(shape, dtype=like.dtype, device=like.device)
    if keys.numel() == 0:
        return keys, values
    read_kernel[(ceil_div(tokens, _TILE), 2 * kv_heads, 1)](
        key_codes,
        key_scale,
        key_minimum,
        value_codes,
        value_scale,
        value_minimum,
        slots,
        positions,
        None if key_signs is None else transposed(key_signs),
        None if value_signs is None else transposed(value_signs),
        key_offset,
        value_offset,
        frequencies,
        keys,
        values,
        rope_scale,
        0,
        tokens,
        0,
        0,
        keys.stride(1),
        keys.stride(0),
        *key_codes.stride()[:3],
        *key_scale.stride()[:3],
        *value_codes.stride()[:3],
        *value_scale.stride()[:3],
        BLOCK_SIZE=key_codes.shape[2],
        PAGED=True,
        LISTED=True,
        SHIFTED=False,
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
