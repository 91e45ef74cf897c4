"""The product with real group scales: the fused kernel of the paper (arXiv 2409.20361, section 4)."""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from collections.abc import Callable

import torch
from torch import Tensor

from ._triton import ceil_div, tl, triton
from .linear_int8 import FLOATING, int8_matmul
from .operation import FEW_TOKENS, Constraints, operation
from .packing import prepared_unpack, weight_operand, weight_sizes

__all__ = ["linear_group_scaled"]


def _fake(
    codes: Tensor,
    scale: Tensor,
    group_scale: Tensor,
    tokens_per_set: int,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    *_: object,
) -> Tensor:
    return codes.new_empty((codes.shape[0], weight_packed.shape[0]), dtype=out_dtype)


def _sizes(
    codes: Tensor,
    scale: Tensor,
    group_scale: Tensor,
    tokens_per_set: int,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    weight_multiplier: Tensor | None,
    unpacked: Tensor | None,
) -> tuple[tuple[str, int], ...]:
    weight = weight_sizes(weight_packed, weight_multiplier)
    return *weight, ("group_size", codes.shape[1] // group_scale.shape[1])


@operation(
    fake=_fake,
    sizes=_sizes,
    dtypes=("out_dtype",),
    activations=3,
    rows=True,
    typical={
        "out_dtype": torch.bfloat16,
        "in_features": 4096,
        "out_features": 4096,
        "group_size": 32,
    },
)
def linear_group_scaled(
    codes: Tensor,
    scale: Tensor,
    group_scale: Tensor,
    tokens_per_set: int,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    weight_multiplier: Tensor | None = None,
    unpacked: Tensor | None = None,
) -> Tensor:
    """``y_in = a_i w_n Σ_g s_g Σ_{k in g} code_ik weight_nk + b_n``: the fused product of arXiv 2409.20361,
    section 4. Each group is accumulated exactly in int32, then rescaled and added in float32.

    Args:
        codes: int8 ``[tokens, in]`` from :func:`~rrsq.kernels.quantize_smoothed`.
        scale: float32 ``[tokens]``.
        group_scale: float32 ``[sets, groups]``; token ``i`` belongs to set ``i // tokens_per_set``.
        tokens_per_set: tokens that share a row of ``group_scale``; any number from ``tokens`` on is all.
        weight_packed: uint8 ``[out, in/2]``, its columns in the channel order of ``codes``.
        weight_scale: float32 ``[out]``.
        bias: ``[out]`` or None.
        out_dtype: dtype of the result.
        weight_multiplier: uint8 ``[out, in/group]`` or None.
        unpacked: see :func:`~rrsq.kernels.linear_int8`.

    Returns:
        ``[tokens, out]``; NaN for a token whose scale is.
    """
    weight = weight_operand.reference(weight_packed, weight_multiplier) if unpacked is None else unpacked
    tokens, channels = codes.shape
    groups = group_scale.shape[1]
    size = channels // groups
    per_token = group_scale.repeat_interleave(min(tokens_per_set, max(tokens, 1)), 0)[:tokens]
    y = torch.zeros(tokens, weight.shape[0], dtype=torch.float32, device=codes.device)
    for g in range(groups):
        columns = slice(g * size, (g + 1) * size)
        part = int8_matmul(codes[:, columns].contiguous(), weight[:, columns].contiguous())
        y.addcmul_(part.float(), per_token[:, g : g + 1])
    y *= scale.unsqueeze(1) * weight_scale
    return (y if bias is None else y + bias.float()).to(out_dtype)


@triton.jit(do_not_specialize=["tokens", "tokens_per_set"])
def _group_scaled_kernel(
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


@linear_group_scaled.kernel(
    "triton",
    Constraints.on_gpu(
        dtypes={"out_dtype": FLOATING},
        at_least={"group_size": 32},
        at_most={"group_size": 256},
        power_of_two=frozenset({"group_size"}),
    ),
)
def _launch(
    codes: Tensor,
    scale: Tensor,
    group_scale: Tensor,
    tokens_per_set: int,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    weight_multiplier: Tensor | None,
    unpacked: Tensor | None,
) -> Tensor:
    if codes.shape[0] == 0:
        return torch.empty((0, weight_packed.shape[0]), dtype=out_dtype, device=codes.device)
    weight = weight_packed, weight_scale, bias, out_dtype, weight_multiplier, unpacked
    return _prepare(codes, scale, group_scale, tokens_per_set, *weight)(codes, scale, group_scale)


def _prepare(
    codes: Tensor,
    scale: Tensor,
    group_scale: Tensor,
    tokens_per_set: int,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    weight_multiplier: Tensor | None,
    unpacked: Tensor | None,
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """See :meth:`~rrsq.kernels.operation.Operation.prepare`."""
    in_features, device = codes.shape[-1], codes.device
    tokens = codes.numel() // in_features
    out_features, group_size = weight_packed.shape[0], in_features // group_scale.shape[1]
    # Tiles hold for a size class of tokens.
    block_tokens, block_out, warps = (
        (128, 128, 8) if tokens > FEW_TOKENS else (64, 64, 4) if tokens > 16 else (16, 64, 4)
    )
    tiles_out = ceil_div(out_features, block_out)
    biases, has_bias = (weight_scale, False) if bias is None else (bias, True)
    weight = prepared_unpack(weight_packed, weight_multiplier, unpacked)

    def run(codes: Tensor, scale: Tensor, group_scale: Tensor) -> Tensor:
        tokens = codes.numel() // in_features
        out = torch.empty(*codes.shape[:-1], out_features, dtype=out_dtype, device=device)
        _group_scaled_kernel[(ceil_div(tokens, block_tokens), tiles_out)](
            codes.contiguous(),
            scale,
            group_scale.contiguous(),
            weight(),
            weight_scale,
            biases,
            out,
            tokens,
            tokens_per_set,
            out_features,
            in_features,
            HAS_BIAS=has_bias,
            GROUP=group_size,
            BLOCK_TOKENS=block_tokens,
            BLOCK_OUT=block_out,
            num_warps=warps,
            num_stages=3,
        )
        return out

    return run


_launch.prepare = _prepare  # type: ignore[attr-defined]
