"""Rotary position embeddings (RoPE, arXiv 2104.09864) of queries and keys in one kernel."""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import COMPILED, ceil_div, next_power_of_two, tl, triton
from .codes import rounded_to
from .operation import Constraints, operation

__all__ = ["rotary"]


def _empty(x: Tensor) -> Tensor:
    """``[batch, heads, tokens, head_dim]`` with a token's heads side by side, as linears give them."""
    batch, heads, tokens, head_dim = x.shape
    return x.new_empty((batch, tokens, heads, head_dim)).transpose(1, 2)


def _fake(query: Tensor, key: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _empty(query), _empty(key)


def _sizes(query: Tensor, key: Tensor, *_: object) -> tuple[tuple[str, int], ...]:
    return (("head_dim", query.shape[3]),)


@operation(
    fake=_fake,
    sizes=_sizes,
    dtypes=("query", "key", "cos", "sin"),
    typical={"query": torch.bfloat16, "key": torch.bfloat16, "head_dim": 128},
    activations=4,
)
def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """``x * cos + rotate_half(x) * sin`` of queries and keys, ``rotate_half((a, b)) = (-b, a)``.

    Of each head, the first ``rotated`` channels, in halves ``a`` and ``b``; the others are left alone.
    Computed in float32 and rounded once.

    Args:
        query: floating point ``[batch, heads, tokens, head_dim]``, any strides.
        key: ``[batch, kv_heads, tokens, head_dim]`` of the same dtype.
        cos, sin: floating point ``[batch or 1, tokens, rotated]``, ``rotated`` even and at most ``head_dim``.

    Returns:
        Queries and keys of the same shapes and dtype, with the heads of a token side by side in memory.
    """
    angles = cos.float().unsqueeze(1), sin.float().unsqueeze(1)
    return _rotated(query, *angles), _rotated(key, *angles)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1] // 2
    y = _empty(x)
    y.copy_(x)
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    turned = torch.cat((-second, first), -1)
    y[..., : 2 * half] = (torch.cat((first, second), -1) * cos + turned * sin).to(x.dtype)
    return y


@triton.jit
def _heads(
    x_pointer,
    y_pointer,
    cos,
    sin,
    stride_head,
    first_head,
    heads,
    HEAD_DIM: tl.constexpr,
    ROTATED: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    PTX: tl.constexpr,
):
    """``HEADS`` heads of one token."""
    DTYPE: tl.constexpr = x_pointer.dtype.element_ty
    half: tl.constexpr = ROTATED // 2
    head = first_head + tl.arange(0, HEADS)
    channel = tl.arange(0, HALF)
    inside = channel < half
    mask = (head < heads)[:, None] & inside[None, :]
    x = x_pointer + head.to(tl.int64)[:, None] * stride_head + channel[None, :]
    y = y_pointer + head[:, None] * HEAD_DIM + channel[None, :]
    first = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x + half, mask=mask, other=0.0).to(tl.float32)
    cos_first = tl.load(cos + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos_second = tl.load(cos + half + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_first = tl.load(sin + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_second = tl.load(sin + half + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    rotated_first = rounded_to(first * cos_first - second * sin_first, DTYPE, PTX)
    rotated_second = rounded_to(second * cos_second + first * sin_second, DTYPE, PTX)
    tl.store(y, rotated_first.to(DTYPE), mask=mask)
    tl.store(y + half, rotated_second.to(DTYPE), mask=mask)
    if ROTATED < HEAD_DIM:
        rest = ROTATED + tl.arange(0, REST)
        mask = (head < heads)[:, None] & (rest < HEAD_DIM)[None, :]
        x = x_pointer + head.to(tl.int64)[:, None] * stride_head + rest[None, :]
        y = y_pointer + head[:, None] * HEAD_DIM + rest[None, :]
        tl.store(y, tl.load(x, mask=mask, other=0.0), mask=mask)


@triton.jit
def _kernel(
    query_pointer,
    key_pointer,
    cos_pointer,
    sin_pointer,
    query_out_pointer,
    key_out_pointer,
    tokens,
    heads,
    kv_heads,
    query_programs,
    query_stride_batch,
    query_stride_head,
    query_stride_token,
    key_stride_batch,
    key_stride_head,
    key_stride_token,
    angle_stride_batch,
    angle_stride_token,
    HEAD_DIM: tl.constexpr,
    ROTATED: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    PTX: tl.constexpr,
):
    """``HEADS`` heads of one token; the last programs of a token have its keys."""
    row = tl.program_id(0)
    program = tl.program_id(1)
    batch = (row // tokens).to(tl.int64)
    token = (row % tokens).to(tl.int64)
    angles = batch * angle_stride_batch + token * angle_stride_token
    if program < query_programs:
        _heads(
            query_pointer + batch * query_stride_batch + token * query_stride_token,
            query_out_pointer + row.to(tl.int64) * heads * HEAD_DIM,
            cos_pointer + angles,
            sin_pointer + angles,
            query_stride_head,
            program * HEADS,
            heads,
            HEAD_DIM,
            ROTATED,
            HEADS,
            HALF,
            REST,
            PTX,
        )
    else:
        _heads(
            key_pointer + batch * key_stride_batch + token * key_stride_token,
            key_out_pointer + row.to(tl.int64) * kv_heads * HEAD_DIM,
            cos_pointer + angles,
            sin_pointer + angles,
            key_stride_head,
            (program - query_programs) * HEADS,
            kv_heads,
            HEAD_DIM,
            ROTATED,
            HEADS,
            HALF,
            REST,
            PTX,
        )


_HEADS = 8
"""Heads of a program."""
_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32})


@rotary.kernel(
    "triton",
    Constraints.on_gpu(
        dtypes=dict.fromkeys(("query", "key", "cos", "sin"), _FLOATS), at_most={"head_dim": 1024}
    ),
)
def _launch(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    query = query if query.stride(3) == 1 else query.contiguous()
    key = key if key.stride(3) == 1 else key.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    batch, heads, tokens, head_dim = query.shape
    kv_heads, rotated = key.shape[1], cos.shape[2]
    query_out, key_out = _empty(query), _empty(key)
    if not query.numel():
        return query_out, key_out
    query_programs = ceil_div(heads, _HEADS)
    _kernel[(batch * tokens, query_programs + ceil_div(kv_heads, _HEADS))](
        query,
        key,
        cos,
        sin,
        query_out,
        key_out,
        tokens,
        heads,
        kv_heads,
        query_programs,
        *query.stride()[:3],
        *key.stride()[:3],
        0 if cos.shape[0] == 1 else cos.stride(0),
        cos.stride(1),
        HEAD_DIM=head_dim,
        ROTATED=rotated,
        HEADS=_HEADS,
        HALF=next_power_of_two(rotated // 2),
        REST=next_power_of_two(max(head_dim - rotated, 1)),
        PTX=COMPILED,
        enable_fp_fusion=False,
        num_warps=4,
    )
    return query_out, key_out
