"""Runtime smoothing: real group scales that tokens share, then quantization of each token.

A scale ``s_g`` shared by a set of tokens divides the activations of a group of channels before per-token
quantization and comes back inside the product (arXiv 2409.20361, sections 3 and 4).
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from collections.abc import Callable

import torch
from torch import Tensor

from ._triton import ceil_div, next_power_of_two, tl, triton
from .codes import TINY, code_max, code_scale, largest_magnitude, round_to_code, scale_of
from .operation import operation
from .quantize_tokens import quantize_tokens
from .rotation import ACTIVATIONS, hadamard_transform, prepared_rotation, rotation_sizes

__all__ = ["quantize_smoothed", "smoothing_scale", "tokens_per_set"]

_BLOCK_TOKENS = 128


def tokens_per_set(scope: str, tokens: int) -> int:
    """Consecutive tokens that share a scale: all (``sequence``), 128 (``block``) or one (``token``)."""
    return {"sequence": max(tokens, 1), "block": _BLOCK_TOKENS, "token": 1}[scope]


def smoothing_scale(x: Tensor, group_size: int, scope: str, statistic: str) -> Tensor:
    """The runtime smoothing scale ``s_g(T)``: the largest ``|x|`` of a set's tokens and a group's channels.

    Args:
        x: float32 ``[tokens, channels]``, already in its channel order.
        group_size: divides ``channels``.
        scope: ``sequence``, ``block`` or ``token``: what one set of tokens is.
        statistic: ``max``, or ``token_normalized_max`` (each token is divided by its root mean square first).

    Returns:
        float32 ``[sets, channels / group_size]``, positive; NaN where the set and group hold NaN or infinity.
    """
    tokens, channels = x.shape
    magnitude = x.abs()
    if statistic == "token_normalized_max":
        magnitude = magnitude / x.square().mean(1, keepdim=True).sqrt().clamp_min(TINY)
    group_max = magnitude.view(tokens, channels // group_size, group_size).amax(2)
    size = tokens_per_set(scope, tokens)
    sets = -(-tokens // size)
    padded = torch.nn.functional.pad(group_max, (0, 0, 0, sets * size - tokens))
    return code_scale(padded.view(sets, size, -1).amax(1), 1.0)


def _fake(x: Tensor, bits: int, group_size: int, scope: str, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    tokens, channels = x.shape
    size = 1 if scope == "token" else tokens_per_set(scope, tokens)
    sets = 1 if scope == "sequence" else -(-tokens // size)
    codes, scale = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(tokens, dtype=torch.float32)
    return codes, scale, x.new_empty((sets, channels // group_size), dtype=torch.float32)


def _sizes(
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
) -> tuple[tuple[str, int], ...]:
    order = None if base is None else base.shape[0]
    rotation = rotation_sizes(x.shape[1], order, hadamard_block, hadamard_inner)
    return ("channels", x.shape[1]), ("group_size", group_size), *rotation


@operation(
    fake=_fake,
    sizes=_sizes,
    dtypes=("x",),
    typical={"x": torch.bfloat16, "channels": 4096, "group_size": 32},
    rows=True,
)
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
    """Rotate (where ``base`` is given), smooth by real group scales and quantize each token symmetrically.

    ``s`` is that of :func:`smoothing_scale`; ``x / s`` is quantized as
    :func:`~rrsq.kernels.quantize_tokens` does without groups (arXiv 2409.20361, section 4).

    Args:
        x: floating point ``[tokens, channels]``.
        bits: 4 or 8.
        group_size: channels a smoothing scale covers; divides ``channels``.
        scope: ``sequence``, ``block`` or ``token``: what tokens share a scale.
        statistic: ``max`` or ``token_normalized_max``.
        clip: fraction of the token's largest smoothed magnitude that the largest code stands for.
        channel_order: int32 ``[channels]`` permutation applied after the rotation, or None.
        base: ``[k, k]`` of ±1 (see :func:`~rrsq.kernels.hadamard_transform`), or None for no rotation.
        hadamard_block: order of the rotation; 0 without one.
        hadamard_inner: see ``inner`` of :func:`~rrsq.kernels.hadamard_transform`.

    Returns:
        ``codes`` int8 ``[tokens, channels]`` (in the channel order), ``scale`` float32 ``[tokens]`` and
        ``group_scale`` float32 ``[sets, groups]``, with ``x[order] ≈ codes * scale * group_scale``. NaN or an
        infinite value makes its group's scale NaN and that of every token of its set.
    """
    if base is not None:
        x = hadamard_transform.reference(x, base, hadamard_block, hadamard_inner)
    x = x.float()
    if channel_order is not None:
        x = x[:, channel_order]
    tokens, channels = x.shape
    group_scale = smoothing_scale(x, group_size, scope, statistic)
    per_token = group_scale.repeat_interleave(tokens_per_set(scope, tokens), 0)[:tokens]
    smoothed = x.view(tokens, -1, group_size) * (1.0 / per_token).unsqueeze(2)
    codes, scale = quantize_tokens.reference(smoothed.view(tokens, channels), bits, None, clip)
    return codes, scale, group_scale


_TINY = tl.constexpr(1e-30)


@triton.jit
def _smoothing_rows(
    x_pointer, order_pointer, row, channels, HAS_ORDER, GROUPS: tl.constexpr, GROUP: tl.constexpr
):
    """A token in its channel order, float32 ``[GROUPS, GROUP]``, zeros past the end, and its mask."""
    offset = tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = offset < channels
    source = offset
    if HAS_ORDER:
        source = tl.load(order_pointer + offset, mask=mask, other=0)
    x = tl.load(x_pointer + row + source, mask=mask, other=0.0).to(tl.float32)
    return x, offset, mask


@triton.jit
def _group_statistic(x, channels, NORMALIZE: tl.constexpr):
    """A token's statistic of each group; NaN where it is none."""
    magnitude = tl.abs(x)
    if NORMALIZE:
        root = tl.sqrt_rn(tl.sum(tl.sum(x * x, 1), 0) / channels)
        root = tl.where(root < _TINY, _TINY, root)
        magnitude = tl.div_rn(magnitude, tl.broadcast_to(root, magnitude.shape))
    return scale_of(largest_magnitude(magnitude, 1), 1.0)


@triton.jit
def _statistic_kernel(
    x_pointer,
    order_pointer,
    group_scale_pointer,
    channels,
    set_size,
    HAS_ORDER: tl.constexpr,
    NORMALIZE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Raise the set's group scales (int32 view of float32 >= 0) to this token's; order does not matter."""
    token = tl.program_id(0)
    row = token.to(tl.int64) * channels
    x, _, _ = _smoothing_rows(x_pointer, order_pointer, row, channels, HAS_ORDER, GROUPS, GROUP)
    statistic = _group_statistic(x, channels, NORMALIZE)
    group = tl.arange(0, GROUPS)
    groups = channels // GROUP
    target = group_scale_pointer + (token // set_size) * groups + group
    tl.atomic_max(target, statistic.to(tl.int32, bitcast=True), mask=group < groups, sem="relaxed")


@triton.jit
def _quantize_kernel(
    x_pointer,
    order_pointer,
    codes_pointer,
    scale_pointer,
    group_scale_pointer,
    channels,
    set_size,
    code_factor,
    CODE_MAX: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TOKEN_SCOPE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """One token: divide by the group scales, quantize. ``TOKEN_SCOPE``: compute and write them too."""
    token = tl.program_id(0)
    row = token.to(tl.int64) * channels
    x, offset, mask = _smoothing_rows(x_pointer, order_pointer, row, channels, HAS_ORDER, GROUPS, GROUP)
    group = tl.arange(0, GROUPS)
    groups = channels // GROUP
    group_pointers = group_scale_pointer + (token // set_size).to(tl.int64) * groups + group
    if TOKEN_SCOPE:
        group_scale = _group_statistic(x, channels, NORMALIZE)
        tl.store(group_pointers, group_scale, mask=group < groups)
    else:
        group_scale = tl.load(group_pointers, mask=group < groups, other=1.0)
    smoothed = x * tl.div_rn(tl.full(group_scale.shape, 1.0, tl.float32), group_scale)[:, None]
    scale = scale_of(largest_magnitude(largest_magnitude(smoothed, 1), 0), code_factor)
    tl.store(scale_pointer + token, scale)
    codes = round_to_code(smoothed * tl.div_rn(1.0, scale), CODE_MAX)
    tl.store(codes_pointer + row + offset, codes.to(tl.int8), mask=mask)


@quantize_smoothed.kernel("triton", ACTIVATIONS)
def _launch(
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
    if x.shape[0] == 0:
        codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
        scale = torch.empty(0, dtype=torch.float32, device=x.device)
        return codes, scale, scale.new_empty((0, x.shape[1] // group_size))
    rotation = base, hadamard_block, hadamard_inner
    return _prepare(x, bits, group_size, scope, statistic, clip, channel_order, *rotation)(x)


def _prepare(
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
) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """See :meth:`~rrsq.kernels.operation.Operation.prepare`; for any number of tokens but none.

    A rotation is a pass of its own here.
    """
    channels, device = x.shape[-1], x.device
    groups = channels // group_size
    limit = code_max(bits)
    code_factor = clip / limit
    padded_groups = next_power_of_two(groups)
    warps = min(max(padded_groups * group_size // 1024, 1), 16)
    ordered, normalize = channel_order is not None, statistic == "token_normalized_max"
    by_token = scope == "token"
    rotate = None if base is None else prepared_rotation(x, base, hadamard_block, hadamard_inner)

    def run(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x.contiguous() if rotate is None else rotate(x)
        tokens = x.numel() // channels
        set_size = tokens_per_set(scope, tokens)
        sets = ceil_div(tokens, set_size)
        codes = torch.empty_like(x, dtype=torch.int8)
        scale = torch.empty(tokens, dtype=torch.float32, device=device)
        order = x if channel_order is None else channel_order
        if by_token:
            group_scale = torch.empty(sets, groups, dtype=torch.float32, device=device)
        else:
            group_scale = torch.full((sets, groups), TINY, dtype=torch.float32, device=device)
            _statistic_kernel[(tokens,)](
                x,
                order,
                group_scale.view(torch.int32),
                channels,
                set_size,
                HAS_ORDER=ordered,
                NORMALIZE=normalize,
                GROUP=group_size,
                GROUPS=padded_groups,
                num_warps=warps,
            )
        _quantize_kernel[(tokens,)](
            x,
            order,
            codes,
            scale,
            group_scale,
            channels,
            set_size,
            code_factor,
            CODE_MAX=limit,
            HAS_ORDER=ordered,
            NORMALIZE=normalize,
            TOKEN_SCOPE=by_token,
            GROUP=group_size,
            GROUPS=padded_groups,
            num_warps=warps,
        )
        return codes, scale, group_scale

    return run


_launch.prepare = _prepare  # type: ignore[attr-defined]
