"""The int8 product for many tokens, its rank-1 epilogue fused."""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import triton
import triton.language as tl

__all__ = ["int8_gemm_descriptor_kernel", "int8_gemm_kernel"]


@triton.jit
def _tile_position(tile, tiles_token, tiles_out, GROUP_TILES: tl.constexpr):
    """Order tiles in bands of ``GROUP_TILES`` rows so that neighbours share operands in the L2."""
    band_size = GROUP_TILES * tiles_out
    band = tile // band_size
    first = band * GROUP_TILES
    height = tl.minimum(tiles_token - first, GROUP_TILES)
    inside = tile % band_size
    return first + inside % height, inside // height


@triton.jit
def _epilogue(
    accumulator, scale_pointer, weight_scale_pointer, bias_pointer, token, out, tokens, out_features, HAS_BIAS
):
    scale = tl.load(scale_pointer + token, mask=token < tokens, other=0.0)
    weight_scale = tl.load(weight_scale_pointer + out, mask=out < out_features, other=0.0)
    y = accumulator.to(tl.float32) * scale[:, None] * weight_scale[None, :]
    if HAS_BIAS:
        y += tl.load(bias_pointer + out, mask=out < out_features, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit(do_not_specialize=["tokens"])
def int8_gemm_kernel(
    operand_pointer,
    scale_pointer,
    weight_pointer,
    weight_scale_pointer,
    bias_pointer,
    out_pointer,
    tokens,
    out_features,
    in_features,
    HAS_BIAS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    GROUP_TILES: tl.constexpr,
    EVEN: tl.constexpr,
):
    """One tile of ``y = a w operand @ weight.T + bias``, for any sizes. ``EVEN``: ``BLOCK_IN`` divides K."""
    tiles_token = tl.cdiv(tokens, BLOCK_TOKENS)
    tiles_out = tl.cdiv(out_features, BLOCK_OUT)
    tile_token, tile_out = _tile_position(tl.program_id(0), tiles_token, tiles_out, GROUP_TILES)
    token = tile_token * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    out = tile_out * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    x_row = tl.minimum(token, tokens - 1).to(tl.int64)
    w_row = tl.minimum(out, out_features - 1).to(tl.int64)
    channel = tl.arange(0, BLOCK_IN)
    x_pointers = operand_pointer + x_row[:, None] * in_features + channel[None, :]
    w_pointers = weight_pointer + w_row[None, :] * in_features + channel[:, None]
    accumulator = tl.zeros([BLOCK_TOKENS, BLOCK_OUT], tl.int32)
    for start in range(0, in_features, BLOCK_IN):
        if EVEN:
            x = tl.load(x_pointers + start)
            w = tl.load(w_pointers + start)
        else:
            x = tl.load(x_pointers + start, mask=(channel < in_features - start)[None, :], other=0)
            w = tl.load(w_pointers + start, mask=(channel < in_features - start)[:, None], other=0)
        accumulator = tl.dot(x, w, accumulator, out_dtype=tl.int32)
    y = _epilogue(
        accumulator,
        scale_pointer,
        weight_scale_pointer,
        bias_pointer,
        token,
        out,
        tokens,
        out_features,
        HAS_BIAS,
    )
    offset = token.to(tl.int64)[:, None] * out_features + out[None, :]
    mask = (token < tokens)[:, None] & (out < out_features)[None, :]
    tl.store(out_pointer + offset, y.to(out_pointer.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def int8_gemm_descriptor_kernel(
    operand_descriptor,
    scale_pointer,
    weight_descriptor,
    weight_scale_pointer,
    bias_pointer,
    out_descriptor,
    tokens,
    out_features,
    in_features,
    HAS_BIAS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    GROUP_TILES: tl.constexpr,
):
    """The same through the tensor memory accelerator, which also fills what lies outside with zeros."""
    tiles_token = tl.cdiv(tokens, BLOCK_TOKENS)
    tiles_out = tl.cdiv(out_features, BLOCK_OUT)
    tile_token, tile_out = _tile_position(tl.program_id(0), tiles_token, tiles_out, GROUP_TILES)
    first_token = tile_token * BLOCK_TOKENS
    first_out = tile_out * BLOCK_OUT
    accumulator = tl.zeros([BLOCK_TOKENS, BLOCK_OUT], tl.int32)
    for start in range(0, in_features, BLOCK_IN):
        x = operand_descriptor.load([first_token, start])
        w = weight_descriptor.load([first_out, start])
        accumulator = tl.dot(x, w.T, accumulator, out_dtype=tl.int32)
    token = first_token + tl.arange(0, BLOCK_TOKENS)
    out = first_out + tl.arange(0, BLOCK_OUT)
    y = _epilogue(
        accumulator,
        scale_pointer,
        weight_scale_pointer,
        bias_pointer,
        token,
        out,
        tokens,
        out_features,
        HAS_BIAS,
    )
    out_descriptor.store([first_token, first_out], y.to(out_descriptor.dtype))
