"""The product of int8 operands with one scale a token: one exact sum, and a rank-1 epilogue."""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ._triton import ceil_div, tl, triton
from .gemv import prepared_gemv
from .operation import FEW_TOKENS, Constraints, operation
from .packed_gemm import prepared_packed_gemm
from .packing import group_size_of, prepared_unpack, supports_words, unpack, weight_operand, weight_sizes
from .plans import FusedPlan, GemvPlan, Plan, TwoPassPlan, plan_for

__all__ = ["FLOATING", "int8_matmul", "launch", "linear_int8"]

FLOATING = frozenset({torch.float16, torch.bfloat16, torch.float32})


_ROWS_FOR_FLOATS = 4
"""From which on the conversion of the weights is worth it."""
_EXACT = 1024
"""Products of two int8 whose sum float32 holds exactly, in any order: ``1024 * 128**2 = 2**24``."""


@functools.cache
def _multiplies_int8() -> bool:
    """Whether this CPU has instructions for products of int8 that torch uses."""
    return bool(torch.cpu._is_vnni_supported())


def _product_of_floats(a: Tensor, b: Tensor) -> Tensor:
    """:func:`int8_matmul` by products of float32, each over so few channels that it is exact."""
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    for part, of_b in zip(a.split(_EXACT, 1), b.split(_EXACT, 1), strict=True):
        total += (part.float() @ of_b.float().t()).to(torch.int32)
    return total


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T`` of int8 ``[m, k]`` and ``[n, k]`` in int32 ``[m, n]``, exact.

    CUDA's ``torch._int_mm`` wants at least 17 rows and multiples of 8 elsewhere: zeros pad what is short. On
    a CPU it is a loop over single numbers where there are no instructions for int8.
    """
    if a.device.type == "cpu" and a.shape[0] >= _ROWS_FOR_FLOATS and not _multiplies_int8():
        return _product_of_floats(a, b)
    if a.device.type != "cuda":
        return torch._int_mm(a, b.t())
    m, k = a.shape
    n = b.shape[0]
    pad_m, pad_n, pad_k = max(0, 17 - m), -n % 8, -k % 8
    if pad_m or pad_n or pad_k:
        a = torch.nn.functional.pad(a, (0, pad_k, 0, pad_m))
        b = torch.nn.functional.pad(b, (0, pad_k, 0, pad_n))
    return torch._int_mm(a, b.t())[:m, :n]


def _fake(
    operand: Tensor,
    scale: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_multiplier: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    *_: object,
) -> Tensor:
    return operand.new_empty((operand.shape[0], weight_packed.shape[0]), dtype=out_dtype)


def _sizes(
    operand: Tensor,
    scale: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_multiplier: Tensor | None,
    *_: object,
) -> tuple[tuple[str, int], ...]:
    return weight_sizes(weight_packed, weight_multiplier)


@operation(
    fake=_fake,
    sizes=_sizes,
    dtypes=("out_dtype",),
    activations=2,
    rows=True,
    typical={
        "out_dtype": torch.bfloat16,
        "in_features": 4096,
        "out_features": 4096,
        "weight_group_size": 32,
    },
)
def linear_int8(
    operand: Tensor,
    scale: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_multiplier: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    unpacked: Tensor | None = None,
) -> Tensor:
    """``y_in = a_i w_n Σ_k operand_ik weight_nk + b_n``: one exact int32 accumulation and a rank-1 epilogue.

    Args:
        operand: int8 ``[tokens, in]`` from :func:`~rrsq.kernels.quantize_tokens`.
        scale: float32 ``[tokens]``.
        weight_packed: uint8 ``[out, in/2]``.
        weight_scale: float32 ``[out]``.
        weight_multiplier: uint8 ``[out, in/group]`` or None.
        bias: ``[out]`` or None.
        out_dtype: dtype of the result.
        unpacked: int8 ``[out, in]`` from :func:`~rrsq.kernels.weight_operand`, for callers that keep it (a
            CPU has no faster way); must equal what ``weight_packed`` and ``weight_multiplier`` unpack to.
            None: unpacked in the call.

    Returns:
        ``[tokens, out]``; NaN for a token whose scale is.
    """
    weight = weight_operand.reference(weight_packed, weight_multiplier) if unpacked is None else unpacked
    y = int8_matmul(operand, weight).float() * scale.unsqueeze(1) * weight_scale
    return (y if bias is None else y + bias.float()).to(out_dtype)


@linear_int8.kernel("triton", Constraints.on_gpu(dtypes={"out_dtype": FLOATING}))
def launch(
    operand: Tensor,
    scale: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_multiplier: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    unpacked: Tensor | None = None,
    plan: Plan | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The kernels of :func:`linear_int8`: by ``plan``, or the one for the shape, into ``out`` if it is there.

    Without ``enable_fp_fusion`` a product and a sum are rounded one after the other, as in the reference, so
    that the results are the reference's to the bit.
    """
    tokens, out_features = operand.shape[0], weight_packed.shape[0]
    if tokens == 0:
        return torch.empty(0, out_features, dtype=out_dtype, device=operand.device)
    operand = operand.contiguous()
    if plan is None:
        plan = _plan_for(operand, weight_packed, weight_multiplier)
    if not isinstance(plan, TwoPassPlan):
        weight = weight_packed, weight_scale, weight_multiplier, bias, out_dtype
        return _PREPARED[type(plan)](plan, *weight, operand.shape[:-1])(operand, scale, out)
    if out is None:
        out = torch.empty(tokens, out_features, dtype=out_dtype, device=operand.device)
    unpacked = unpack(weight_packed, weight_multiplier) if unpacked is None else unpacked
    return _int8_gemm(plan, operand, scale, unpacked, weight_scale, bias, out)


_PREPARED: dict[type[Plan], Callable[..., Callable[..., Tensor]]] = {
    GemvPlan: prepared_gemv,
    FusedPlan: prepared_packed_gemm,
}


def _plan_for(operand: Tensor, weight_packed: Tensor, weight_multiplier: Tensor | None) -> Plan:
    in_features = operand.shape[-1]
    tokens = operand.numel() // in_features
    packed_words = supports_words(in_features, group_size_of(in_features, weight_multiplier))
    return plan_for(tokens, weight_packed.shape[0], in_features, packed_words, operand.device)


def _prepare(
    operand: Tensor,
    scale: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_multiplier: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    unpacked: Tensor | None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """See :meth:`~rrsq.kernels.operation.Operation.prepare`."""
    product = weight_packed, weight_scale, weight_multiplier, bias, out_dtype
    (out_features, in_features), device = (weight_packed.shape[0], operand.shape[-1]), operand.device
    if operand.numel() <= FEW_TOKENS * in_features:
        plan = _plan_for(operand, weight_packed, weight_multiplier)
        if not isinstance(plan, TwoPassPlan):
            return _PREPARED[type(plan)](plan, *product, operand.shape[:-1])
    packed_words = supports_words(in_features, group_size_of(in_features, weight_multiplier))
    weight = prepared_unpack(weight_packed, weight_multiplier, unpacked)
    prepared: dict[Plan, Callable[..., Tensor]] = {}

    def run(operand: Tensor, scale: Tensor) -> Tensor:
        plan = plan_for(operand.numel() // in_features, out_features, in_features, packed_words, device)
        out = torch.empty(*operand.shape[:-1], out_features, dtype=out_dtype, device=device)
        if isinstance(plan, TwoPassPlan):
            return _int8_gemm(plan, operand.contiguous(), scale, weight(), weight_scale, bias, out)
        multiply = prepared.get(plan)
        if multiply is None:
            multiply = prepared[plan] = _PREPARED[type(plan)](plan, *product, operand.shape[:-1])
        return multiply(operand, scale, out)

    return run


launch.prepare = _prepare  # type: ignore[attr-defined]


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
def _int8_gemm_kernel(
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
def _int8_gemm_descriptor_kernel(
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


def _int8_gemm(
    plan: TwoPassPlan,
    operand: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> Tensor:
    """``out = scale ⊗ weight_scale ⊙ (operand @ weight.T) + bias`` of int8 operand and weight."""
    out_features, in_features = weight.shape
    tokens = operand.numel() // in_features
    tiles = ceil_div(tokens, plan.block_tokens) * ceil_div(out_features, plan.block_out)
    bias_argument = weight_scale if bias is None else bias
    if plan.descriptors and _describable(operand, weight, out):
        from triton.tools.tensor_descriptor import TensorDescriptor

        rows, out_rows = operand.view(tokens, in_features), out.view(tokens, out_features)
        _int8_gemm_descriptor_kernel[(tiles,)](
            TensorDescriptor.from_tensor(rows, [plan.block_tokens, plan.block_in]),
            scale,
            TensorDescriptor.from_tensor(weight, [plan.block_out, plan.block_in]),
            weight_scale,
            bias_argument,
            TensorDescriptor.from_tensor(out_rows, [plan.block_tokens, plan.block_out]),
            tokens,
            out_features,
            in_features,
            bias is not None,
            plan.block_tokens,
            plan.block_out,
            plan.block_in,
            plan.group_tiles,
            enable_fp_fusion=False,
            num_warps=plan.warps,
            num_stages=plan.stages,
        )
    else:
        _int8_gemm_kernel[(tiles,)](
            operand,
            scale,
            weight,
            weight_scale,
            bias_argument,
            out,
            tokens,
            out_features,
            in_features,
            bias is not None,
            plan.block_tokens,
            plan.block_out,
            plan.block_in,
            plan.group_tiles,
            in_features % plan.block_in == 0,
            enable_fp_fusion=False,
            num_warps=plan.warps,
            num_stages=plan.stages,
        )
    return out


def _describable(*tensors: Tensor) -> bool:
    """Whether the tensor memory accelerator can address them, contiguous: 16-byte aligned bases and rows."""
    return all(
        tensor.data_ptr() % 16 == 0 and tensor.shape[-1] * tensor.element_size() % 16 == 0
        for tensor in tensors
    )
