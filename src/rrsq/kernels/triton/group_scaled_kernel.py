"""The product with real group scales: the fused kernel of the paper (arXiv 2409.20361, section 4)."""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import triton
import triton.language as tl

__all__ = ["group_scaled_kernel"]


@triton.jit(do_not_specialize=["tokens", "tokens_per_set"])
def group_scaled_kernel(
    codes_pointer,
    scale_pointer,
    group_scale_pointer,
    weight_pointer,
    weight_scale_pointer,
    bias_pointer,
    out_pointer,
    tokens,
    tokens_per_set,
    out_features,
    in_features,
    HAS_BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """One tile of ``y``: each group is exact in int32, then rescaled and added in float32."""
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    x_row = tl.minimum(token, tokens - 1).to(tl.int64)
    w_row = tl.minimum(out, out_features - 1).to(tl.int64)
    channel = tl.arange(0, GROUP)
    groups = in_features // GROUP
    x_pointers = codes_pointer + x_row[:, None] * in_features + channel[None, :]
    w_pointers = weight_pointer + w_row[None, :] * in_features + channel[:, None]
    group_scales = group_scale_pointer + (x_row // tokens_per_set) * groups
    total = tl.zeros([BLOCK_TOKENS, BLOCK_OUT], tl.float32)
    for group in range(groups):
        x = tl.load(x_pointers + group * GROUP)
        w = tl.load(w_pointers + group * GROUP)
        part = tl.dot(x, w, out_dtype=tl.int32)
        total += part.to(tl.float32) * tl.load(group_scales + group)[:, None]
    scale = tl.load(scale_pointer + x_row)
    y = total * (scale[:, None] * tl.load(weight_scale_pointer + w_row)[None, :])
    if HAS_BIAS:
        y += tl.load(bias_pointer + w_row).to(tl.float32)[None, :]
    offset = token.to(tl.int64)[:, None] * out_features + out[None, :]
    mask = (token < tokens)[:, None] & (out < out_features)[None, :]
    tl.store(out_pointer + offset, y.to(out_pointer.dtype.element_ty), mask=mask)
