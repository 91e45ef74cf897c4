"""The operations as ``torch.library`` ops, so that ``torch.compile`` and CUDA graphs capture them whole.

Every op takes tensors and plain scalars, synchronizes with nothing, and asks the dispatch (:mod:`.dispatch`)
for its implementation when it runs, so :func:`~rrsq.kernels.dispatch.use_kernels` also governs compiled code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import fake, registry
from .dispatch import Call, resolve
from .routing import Routing

__all__ = [
    "grouped_linear",
    "hadamard_transform",
    "linear_folded",
    "linear_group_scaled",
    "linear_weight_only",
    "quantize_folded",
    "quantize_smoothed",
    "weight_operand",
]

_library = torch.library.Library("rrsq", "DEF")
_library.define("hadamard_transform(Tensor x, Tensor base, int hadamard_block, int inner) -> Tensor")
_library.define(
    "quantize_folded(Tensor x, int bits, int? group_size, float clip, Tensor? base, int hadamard_block, "
    "int hadamard_inner) -> (Tensor, Tensor)"
)
_library.define(
    "quantize_smoothed(Tensor x, int bits, int group_size, str scope, str statistic, float clip, "
    "Tensor? channel_order, Tensor? base, int hadamard_block, int hadamard_inner) -> (Tensor, Tensor, Tensor)"
)
_library.define("weight_operand(Tensor packed, Tensor? multiplier) -> Tensor")
_library.define(
    "linear_folded(Tensor operand, Tensor scale, Tensor weight_packed, Tensor weight_scale, "
    "Tensor? weight_multiplier, Tensor? bias, ScalarType out_dtype, Tensor? unpacked) -> Tensor"
)
_library.define(
    "linear_group_scaled(Tensor codes, Tensor scale, Tensor group_scale, int tokens_per_set, "
    "Tensor weight_packed, Tensor weight_scale, Tensor? weight_multiplier, Tensor? bias, "
    "ScalarType out_dtype, Tensor? unpacked) -> Tensor"
)
_library.define(
    "linear_weight_only(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor? weight_multiplier, "
    "Tensor? bias, Tensor? unpacked) -> Tensor"
)
_library.define(
    "grouped_linear(Tensor operand, Tensor? scale, Tensor? group_scale, int tokens_per_set, Tensor experts, "
    "Tensor order, Tensor start, Tensor ends, Tensor blocks, int block_rows, int rows_per_token, "
    "Tensor weight_packed, Tensor weight_scale, Tensor? weight_multiplier, ScalarType out_dtype, "
    "Tensor? unpacked) -> Tensor"
)


def rotation_sizes(
    channels: int, base: Tensor | None, hadamard_block: int, inner: int
) -> tuple[tuple[str, int], ...]:
    """The sizes of a rotation that a kernel may constrain; nothing when there is no rotation.

    ``hadamard_rows`` and ``hadamard_columns``: a token seen as rows that need a dense product and contiguous
    columns that Sylvester's matrix mixes (``inner`` > 1: that are not mixed).
    """
    if base is None:
        return ()
    columns = hadamard_block // base.shape[0] if inner == 1 else inner
    return ("hadamard_rows", channels // columns), ("hadamard_columns", columns)


def weight_sizes(tokens: int, packed: Tensor, multiplier: Tensor | None) -> tuple[tuple[str, int], ...]:
    """The sizes of a linear, or of all experts' linears, that a kernel may constrain."""
    in_features = 2 * packed.shape[-1]
    sizes = (("tokens", tokens), ("in_features", in_features), ("out_features", packed.shape[-2]))
    return (
        sizes if multiplier is None else (*sizes, ("weight_group_size", in_features // multiplier.shape[-1]))
    )


def _run(call: Call, *arguments: object) -> Any:
    """Run the kernel of a call with its device as the current one, where Triton launches."""
    kernel = resolve(call)
    if call.device.type == "cuda" and call.device.index != torch.cuda.current_device():
        with torch.cuda.device(call.device):
            return kernel(*arguments)
    return kernel(*arguments)


def _hadamard_transform(x: Tensor, base: Tensor, hadamard_block: int, inner: int) -> Tensor:
    sizes = (("channels", x.shape[-1]), *rotation_sizes(x.shape[-1], base, hadamard_block, inner))
    call = Call("hadamard_transform", x.device, (("x", x.dtype),), sizes)
    return _run(call, x, base, hadamard_block, inner)


def _quantize_folded(
    x: Tensor,
    bits: int,
    group_size: int | None,
    clip: float,
    base: Tensor | None,
    hadamard_block: int,
    hadamard_inner: int,
) -> tuple[Tensor, Tensor]:
    group = () if group_size is None else (("group_size", group_size),)
    sizes = (
        ("channels", x.shape[1]),
        *group,
        *rotation_sizes(x.shape[1], base, hadamard_block, hadamard_inner),
    )
    call = Call("quantize_folded", x.device, (("x", x.dtype),), sizes)
    return _run(call, x, bits, group_size, clip, base, hadamard_block, hadamard_inner)


def _quantize_smoothed(
    x: Tensor,
    bits: int,
    group_size: int,
    scope: str,
    statistic: str,
    clip: float,
    channel_order: Tensor | None,
    base: Tensor | None,
    hadamard_block: int,
    hadamard_inner: int,
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (
        ("channels", x.shape[1]),
        ("group_size", group_size),
        *rotation_sizes(x.shape[1], base, hadamard_block, hadamard_inner),
    )
    call = Call("quantize_smoothed", x.device, (("x", x.dtype),), sizes)
    return _run(
        call, x, bits, group_size, scope, statistic, clip, channel_order, base, hadamard_block, hadamard_inner
    )


def _weight_operand(packed: Tensor, multiplier: Tensor | None) -> Tensor:
    call = Call("weight_operand", packed.device, (), weight_sizes(1, packed, multiplier)[1:])
    return _run(call, packed, multiplier)


def _linear_folded(
    operand: Tensor,
    scale: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_multiplier: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    unpacked: Tensor | None,
) -> Tensor:
    sizes = weight_sizes(operand.shape[0], weight_packed, weight_multiplier)
    call = Call("linear_folded", operand.device, (("out_dtype", out_dtype),), sizes)
    return _run(
        call, operand, scale, weight_packed, weight_scale, weight_multiplier, bias, out_dtype, unpacked
    )


def _linear_group_scaled(
    codes: Tensor,
    scale: Tensor,
    group_scale: Tensor,
    tokens_per_set: int,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_multiplier: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    unpacked: Tensor | None,
) -> Tensor:
    group_size = codes.shape[1] // group_scale.shape[1]
    sizes = (*weight_sizes(codes.shape[0], weight_packed, weight_multiplier), ("group_size", group_size))
    call = Call("linear_group_scaled", codes.device, (("out_dtype", out_dtype),), sizes)
    return _run(
        call,
        codes,
        scale,
        group_scale,
        tokens_per_set,
        weight_packed,
        weight_scale,
        weight_multiplier,
        bias,
        out_dtype,
        unpacked,
    )


def _linear_weight_only(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_multiplier: Tensor | None,
    bias: Tensor | None,
    unpacked: Tensor | None,
) -> Tensor:
    sizes = weight_sizes(x.shape[0], weight_packed, weight_multiplier)
    call = Call("linear_weight_only", x.device, (("x", x.dtype),), sizes)
    return _run(call, x, weight_packed, weight_scale, weight_multiplier, bias, unpacked)


def _grouped_linear(
    operand: Tensor,
    scale: Tensor | None,
    group_scale: Tensor | None,
    tokens_per_set: int,
    experts: Tensor,
    order: Tensor,
    start: Tensor,
    ends: Tensor,
    blocks: Tensor,
    block_rows: int,
    rows_per_token: int,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_multiplier: Tensor | None,
    out_dtype: torch.dtype,
    unpacked: Tensor | None,
) -> Tensor:
    group = () if group_scale is None else (("group_scale", group_scale.shape[1]),)
    sizes = (*weight_sizes(experts.shape[0], weight_packed, weight_multiplier), *group)
    dtypes = (("operand", operand.dtype), ("out_dtype", out_dtype))
    return _run(
        Call("grouped_linear", operand.device, dtypes, sizes),
        operand,
        scale,
        group_scale,
        tokens_per_set,
        experts,
        order,
        start,
        ends,
        blocks,
        block_rows,
        rows_per_token,
        weight_packed,
        weight_scale,
        weight_multiplier,
        out_dtype,
        unpacked,
    )


for _name in registry.OPERATIONS:
    _library.impl(_name, globals()[f"_{_name}"], "CompositeExplicitAutograd")
    torch.library.register_fake(f"rrsq::{_name}", getattr(fake, _name), lib=_library)


def hadamard_transform(x: Tensor, base: Tensor, hadamard_block: int, inner: int = 1) -> Tensor:
    """Rotate blocks of channels online: ``x @ R``, ``R`` orthonormal (QuaRot, arXiv 2404.00456, section 4).

    Each run of ``hadamard_block * inner`` channels is seen as ``[hadamard_block, inner]`` and mixed over its
    first index by ``kron(base, sylvester) / sqrt(hadamard_block)``; so ``R = kron(H, I_inner)`` in each run.
    ``inner`` is 1 for an ordinary rotation; the rotation across heads of ``o_proj``'s input has
    ``hadamard_block = heads`` and ``inner = head_dim``.

    Args:
        x: floating point ``[..., channels]``; ``channels`` is a multiple of ``hadamard_block * inner``.
        base: ``[k, k]`` of ±1, any dtype; ``hadamard_block / k`` is a power of two.
        hadamard_block: order of the Hadamard matrix.
        inner: channels between neighbours that are mixed.

    Returns:
        A tensor like ``x``, in float32 if ``x`` is of lower precision.
    """
    return torch.ops.rrsq.hadamard_transform(x, base, hadamard_block, inner)


def quantize_folded(
    x: Tensor,
    bits: int,
    group_size: int | None,
    clip: float,
    base: Tensor | None = None,
    hadamard_block: int = 0,
    hadamard_inner: int = 1,
) -> tuple[Tensor, Tensor]:
    """Rotate (where ``base`` is given) and quantize each token, with integer-folded group scales.

    The arithmetic is that of :func:`rrsq.kernels.eager.activation.quantize_folded` on the rotated
    activations; on a GPU it is one pass that reads ``x`` and writes the operand.

    Args:
        x: floating point ``[tokens, channels]``.
        bits: 4 or 8; groups need 4.
        group_size: channels a multiplier covers, or None for one scale a token.
        clip: fraction of the largest magnitude that the largest code stands for, in (0, 1].
        base: ``[k, k]`` of ±1 (see :func:`hadamard_transform`), or None for no rotation.
        hadamard_block: order of the rotation; 0 without one.
        hadamard_inner: see ``inner`` of :func:`hadamard_transform`.

    Returns:
        ``operand`` int8 ``[tokens, channels]`` and ``scale`` float32 ``[tokens]``.
    """
    return torch.ops.rrsq.quantize_folded(x, bits, group_size, clip, base, hadamard_block, hadamard_inner)


def quantize_smoothed(
    x: Tensor,
    bits: int,
    group_size: int,
    scope: str,
    statistic: str,
    clip: float,
    channel_order: Tensor | None = None,
    base: Tensor | None = None,
    hadamard_block: int = 0,
    hadamard_inner: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate (where ``base`` is given), smooth by real group scales and quantize each token.

    The arithmetic is that of :func:`rrsq.kernels.eager.activation.quantize_smoothed` (arXiv 2409.20361,
    section 4) on the rotated activations.

    Args:
        x: floating point ``[tokens, channels]``.
        bits: 4 or 8.
        group_size: channels a smoothing scale covers; divides ``channels``.
        scope: ``sequence``, ``block`` or ``token``.
        statistic: ``max`` or ``token_normalized_max``.
        clip: fraction of the token's largest smoothed magnitude that the largest code stands for.
        channel_order: int32 ``[channels]`` permutation applied after the rotation, or None.
        base: ``[k, k]`` of ±1 (see :func:`hadamard_transform`), or None for no rotation.
        hadamard_block: order of the rotation; 0 without one.
        hadamard_inner: see ``inner`` of :func:`hadamard_transform`.

    Returns:
        ``codes`` int8 ``[tokens, channels]``, ``scale`` float32 ``[tokens]``, ``group_scale`` float32
        ``[sets, groups]``.
    """
    return torch.ops.rrsq.quantize_smoothed(
        x, bits, group_size, scope, statistic, clip, channel_order, base, hadamard_block, hadamard_inner
    )


def weight_operand(packed: Tensor, multiplier: Tensor | None = None) -> Tensor:
    """Unpack INT4 codes and multiply them by their group's multiplier.

    Args:
        packed: uint8 ``[out, in/2]``.
        multiplier: uint8 ``[out, in/group]`` with values in 1..15, or None.

    Returns:
        int8 ``[out, in]``.
    """
    return torch.ops.rrsq.weight_operand(packed, multiplier)


def linear_folded(
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
        operand: int8 ``[tokens, in]`` from :func:`quantize_folded`.
        scale: float32 ``[tokens]``.
        weight_packed: uint8 ``[out, in/2]``.
        weight_scale: float32 ``[out]``.
        weight_multiplier: uint8 ``[out, in/group]`` or None.
        bias: ``[out]`` or None.
        out_dtype: dtype of the result.
        unpacked: int8 ``[out, in]`` from :func:`weight_operand`, for callers that keep it (a CPU has no
            faster way); must equal what ``weight_packed`` and ``weight_multiplier`` unpack to. None: unpacked
            in the call.

    Returns:
        ``[tokens, out]``.
    """
    return torch.ops.rrsq.linear_folded(
        operand, scale, weight_packed, weight_scale, weight_multiplier, bias, out_dtype, unpacked
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
    section 4.

    Args:
        codes: int8 ``[tokens, in]`` from :func:`quantize_smoothed`.
        scale: float32 ``[tokens]``.
        group_scale: float32 ``[sets, groups]``; token ``i`` belongs to set ``i // tokens_per_set``.
        tokens_per_set: tokens that share a row of ``group_scale``.
        weight_packed: uint8 ``[out, in/2]``, its columns in the channel order of ``codes``.
        weight_scale: float32 ``[out]``.
        bias: ``[out]`` or None.
        out_dtype: dtype of the result.
        weight_multiplier: uint8 ``[out, in/group]`` or None.
        unpacked: see :func:`linear_folded`.

    Returns:
        ``[tokens, out]``.
    """
    return torch.ops.rrsq.linear_group_scaled(
        codes,
        scale,
        group_scale,
        tokens_per_set,
        weight_packed,
        weight_scale,
        weight_multiplier,
        bias,
        out_dtype,
        unpacked,
    )


def linear_weight_only(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_multiplier: Tensor | None,
    bias: Tensor | None,
    unpacked: Tensor | None = None,
) -> Tensor:
    """16-bit activations: the weight is dequantized to the dtype of ``x``.

    Args:
        x: floating point ``[tokens, in]``.
        weight_packed: uint8 ``[out, in/2]``.
        weight_scale: float32 ``[out]``.
        weight_multiplier: uint8 ``[out, in/group]`` or None.
        bias: ``[out]`` or None.
        unpacked: see :func:`linear_folded`.

    Returns:
        ``[tokens, out]`` in the dtype of ``x``.
    """
    return torch.ops.rrsq.linear_weight_only(
        x, weight_packed, weight_scale, weight_multiplier, bias, unpacked
    )


def grouped_linear(
    operand: Tensor,
    scale: Tensor | None,
    group_scale: Tensor | None,
    tokens_per_set: int,
    routing: Routing,
    rows_per_token: int,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_multiplier: Tensor | None,
    out_dtype: torch.dtype,
    unpacked: Tensor | None = None,
) -> Tensor:
    """The linears of a mixture of experts: ``y_rn = a_t w_en Σ_k operand_tk weight_enk`` with token
    ``t = r // rows_per_token`` and expert ``e = experts[r]``.

    The operand is what the recipe makes of activations: that of :func:`linear_folded` (``scale`` only), of
    :func:`linear_group_scaled` (``scale`` and ``group_scale``) or of :func:`linear_weight_only` (neither).

    Args:
        operand: int8 ``[tokens, in]``, or floating point.
        scale: float32 ``[tokens]``, or None for 16-bit activations.
        group_scale: float32 ``[sets, groups]`` or None.
        tokens_per_set: tokens that share a row of ``group_scale``.
        routing: of ``tokens * rows_per_token`` rows, from :func:`rrsq.kernels.route_rows`.
        rows_per_token: rows of the result that read the same token.
        weight_packed: uint8 ``[experts, out, in/2]``.
        weight_scale: float32 ``[experts, out]``.
        weight_multiplier: uint8 ``[experts, out, in/group]`` or None.
        out_dtype: dtype of the result.
        unpacked: int8 ``[experts, out, in]``; see :func:`linear_folded`.

    Returns:
        ``[rows, out]``.
    """
    return torch.ops.rrsq.grouped_linear(
        operand,
        scale,
        group_scale,
        tokens_per_set,
        *routing,
        rows_per_token,
        weight_packed,
        weight_scale,
        weight_multiplier,
        out_dtype,
        unpacked,
    )
