"""Attention from a quantized cache, for one or a few new tokens a sequence: decoding.

Nothing is dequantized into memory. With what :mod:`.cache` stores of a key, ``c = (k - RoPE_p(mu)) D H``,
and a query ``q`` after RoPE, ``q · k = (q D⁻¹ H) · c + q · RoPE_p(mu)``: the query is divided and rotated
once, and the offset is a number a key. With ``A = q_a mu_a + q_b mu_b`` and ``B = q_b mu_a - q_a mu_b`` for
each pair ``(a, b)`` of channels that RoPE turns, ``q · RoPE_p(mu) = sum A cos(p f) + B sin(p f)``. In a tile,
``p = p_0 + j``, turning ``(A, B)`` back by ``p_0 f`` leaves a product with the constant ``cos(j f)`` and
``sin(j f)``. Where position 0 has an offset of its own, ``mu_0``, its logit gets ``q · (mu_0 - mu)`` as well.
"""

# Tuples of tiles grow by a tile at a time, and kernels cannot unpack them.
# A branch that a constant leaves out is not compiled only if the constant stands alone.
# ruff: noqa: RUF005, SIM102
# mypy: disallow-untyped-defs=False, check-untyped-defs=False
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import COMPILED, ceil_div, next_power_of_two, processors, tl, triton
from .cache import chunk_size, dequantized_chunk, inverse_power, signs_as, turned
from .cache_read import cache_read
from .operation import Constraints, operation
from .warp_attention import GROUP, attend_by_warps

__all__ = ["QUERIES", "cache_attend"]

QUERIES = 16
"""New tokens a sequence up to which decoding from codes is offered; for more, keys are read out first."""

_COMPILED = tl.constexpr(COMPILED)
_TILE = 32
_STAGES = 2
_WARPS = 8
"""Warps that a processor of the GPU holds: they take all of its registers."""
_SPAN = 256
"""Keys whose offsets the kernel of warps turns at a time."""
_MOST_SPLITS = 128
_COMBINED = 32
_FEW_ROWS = 1024
_LOG2E = tl.constexpr(1.4426950408889634)


def _fake(*_: object) -> None:
    return None


def _sizes(query: Tensor, key_codes: Tensor, *_: object) -> tuple[tuple[str, int], ...]:
    return ("tokens", query.shape[1]), ("head_dim", query.shape[3])


@operation(
    fake=_fake,
    sizes=_sizes,
    dtypes=("query",),
    mutates=("output",),
    typical={"query": torch.bfloat16, "tokens": 1, "head_dim": 128},
)
def cache_attend(
    query: Tensor,
    key_codes: Tensor,
    key_scale: Tensor,
    key_minimum: Tensor | None,
    value_codes: Tensor,
    value_scale: Tensor,
    value_minimum: Tensor | None,
    lengths: Tensor,
    added: int,
    block_table: Tensor | None,
    mask: Tensor | None,
    signs: Tensor | None,
    key_offset: Tensor | None,
    key_sink: Tensor | None,
    key_balance: Tensor | None,
    value_offset: Tensor | None,
    frequencies: Tensor | None,
    rope_scale: float,
    shift: Tensor | None,
    scaling: float,
    softcap: float,
    window: int,
    output: Tensor,
) -> None:
    """``softmax(scaling q k^T) v`` over cached keys and values, causal among the new tokens.

    Args:
        query: ``[batch, tokens, heads, head_dim]`` after RoPE; ``heads`` a multiple of ``kv_heads``.
        key_codes, key_scale, key_minimum, value_codes, value_scale, value_minimum: see
            :class:`~rrsq.kernels.cache.CachePages`. The new tokens' are in it.
        lengths: int32 ``[batch]`` or ``[1]``: with ``added``, cached tokens of each sequence, the new ones
            included.
        added: see ``lengths``.
        block_table: see :mod:`rrsq.kernels.cache`.
        mask: bool ``[batch or 1, 1, tokens or 1, columns]``, false: not seen. Column ``n`` is that of
            cached token ``n``; beyond the last column all is seen.
        signs: int8 ``[head_dim, head_dim]`` of ±1, the Hadamard matrix of the keys, or None.
        key_offset, value_offset: float32 ``[kv_heads, head_dim]``, or None.
        key_balance: see :func:`~rrsq.kernels.cache_append`.
        key_sink, frequencies, rope_scale: see :func:`~rrsq.kernels.cache.offset_keys`.
        shift: int32 ``[batch]``: cached token ``n`` is at position ``n + shift``; None for 0.
        scaling: factor of the logits.
        softcap: ``c`` of ``c tanh(logit / c)`` (arXiv 2408.00118), or 0.
        window: keys a query sees, itself included; 0: all.
        output: ``[batch, tokens, heads, head_dim]``, of the dtype of ``query``; written to, 0 for a token
            that sees nothing.
    """
    batch, tokens, heads, _ = query.shape
    total = lengths.long().expand(batch) + added
    longest = int(total.max()) if batch else 0
    slots = torch.arange(longest, device=query.device)
    keys, values = cache_read.reference(
        query.float().transpose(1, 2),
        key_codes,
        key_scale,
        key_minimum,
        value_codes,
        value_scale,
        value_minimum,
        0,
        longest,
        block_table,
        shift,
        signs,
        None,
        key_offset,
        key_sink,
        key_balance,
        value_offset,
        frequencies,
        rope_scale,
    )
    shared = heads // keys.shape[1]
    keys, values = keys.repeat_interleave(shared, 1), values.repeat_interleave(shared, 1)
    logits = query.transpose(1, 2).float() @ keys.transpose(2, 3) * scaling
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    last = (total[:, None] - tokens + torch.arange(tokens, device=query.device))[:, None, :, None]
    seen = slots <= last
    if window:
        seen = seen & (slots > last - window)
    if mask is not None:
        chosen = mask[..., slots.clamp(max=mask.shape[-1] - 1)]
        seen = seen & (chosen | (slots >= mask.shape[-1]))
    weights = torch.softmax(logits.masked_fill(~seen, -torch.inf), -1).masked_fill(~seen.any(-1, True), 0)
    output.copy_((weights @ values).transpose(1, 2))


@triton.jit
def _of_signs(
    corner, x, count, CHUNK: tl.constexpr, HALF: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr
):
    """``count`` rows of ``H^T x`` without its norm, float32 ``[CHUNK, ROWS]``; ``x``: half the channels."""
    inner = tl.arange(0, PADDED)
    row = tl.arange(0, CHUNK)
    place = corner + row[:, None] + inner[None, :] * HEAD_DIM
    matrix = tl.load(place, mask=(row < count)[:, None] & (inner < HALF)[None, :], other=0)
    if not _COMPILED:
        return tl.dot(matrix.to(tl.float32), x.to(tl.float32), input_precision="ieee")
    if x.dtype == tl.float32:
        upper = x.to(tl.bfloat16)
        lower = (x - upper.to(tl.float32)).to(tl.bfloat16)
        sign = signs_as(matrix, tl.bfloat16)
        product = tl.dot(sign, lower, tl.dot(sign, upper))
    else:
        product = tl.dot(signs_as(matrix, x.dtype), x)
    return product


@triton.jit
def _prepare_kernel(
    query,
    signs,
    key_offset,
    key_sink,
    key_balance,
    frequencies,
    prepared,
    factors,
    steps,
    rows,
    scaling,
    rope_scale,
    query_stride_batch,
    query_stride_token,
    query_stride_head,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEY_CHUNK: tl.constexpr,
    ROTATED: tl.constexpr,
    BALANCED: tl.constexpr,
    OFFSET: tl.constexpr,
    SINK: tl.constexpr,
    PAIRS: tl.constexpr,
    PADDED_PAIRS: tl.constexpr,
    HEADS_AT_ONCE: tl.constexpr,
    TILE: tl.constexpr,
):
    """What all parts of the keys need, once: ``q H``, ``A`` and ``B``, cosines and sines within a tile.

    A program does some heads of tokens: a chunk of ``q H``, or behind those ``A`` and ``B``. Both are divided
    by something that nothing of their head exceeds, so that they fit into float16. With the ``ROWS``
    queries that read the same keys side by side, ``prepared`` holds the first, float16 ``[ROWS, channels
    in chunks]``, and ``factors`` float32 ``[4 + 2 PADDED_PAIRS + chunks, ROWS]``: what takes logits back, of
    the codes and of the offset; the part of the offset that RoPE does not turn; ``q · (mu_0 - mu)``; ``A``;
    ``B``; the sum of each chunk of ``q H``. One program writes ``steps``, float16 ``[2, TILE,
    PADDED_PAIRS]``, of the angles ``j f``.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    CHUNKS: tl.constexpr = (HALF + KEY_CHUNK - 1) // KEY_CHUNK
    chunk = tl.program_id(0)
    row = tl.program_id(1) * HEADS_AT_ONCE + tl.arange(0, HEADS_AT_ONCE)
    present = row < rows
    batch = (row // (TOKENS * HEADS)).to(tl.int64)
    token = row // HEADS % TOKENS
    head = row % HEADS
    kv_head = head // SHARED
    group = batch * (HEADS // SHARED) + kv_head
    own = token * SHARED + head % SHARED
    q_rows = query + batch * query_stride_batch + token * query_stride_token + head * query_stride_head
    factor = factors + group * ((4 + 2 * PADDED_PAIRS + 2 * CHUNKS) * ROWS) + own
    if chunk < 2 * CHUNKS:
        channel = tl.arange(0, PADDED)
        used = (channel < HALF)[:, None] & present[None, :]
        q_low = tl.load(q_rows[None, :] + channel[:, None], mask=used, other=0.0)
        q_high = tl.load(q_rows[None, :] + (channel + HALF)[:, None], mask=used, other=0.0)
        if BALANCED:  # Powers of two: the quotients are exact.
            balance = (key_balance + kv_head * HEAD_DIM)[None, :] + channel[:, None]
            of_low = inverse_power(tl.load(balance, mask=used, other=1.0))
            of_high = inverse_power(tl.load(balance + HALF, mask=used, other=1.0))
            q_low = (q_low.to(tl.float32) * of_low).to(q_low.dtype)
            q_high = (q_high.to(tl.float32) * of_high).to(q_high.dtype)
        low_size = tl.abs(q_low.to(tl.float32))
        high_size = tl.abs(q_high.to(tl.float32))
        half = chunk // CHUNKS
        begin = chunk % CHUNKS * KEY_CHUNK
        inner = tl.arange(0, KEY_CHUNK)
        if ROTATED:
            largest = (tl.sum(low_size, 0) + tl.sum(high_size, 0)) * HEAD_DIM**-0.5
            corner = signs + half * HALF + begin
            part = _of_signs(corner, q_low, HALF - begin, KEY_CHUNK, HALF, HEAD_DIM, PADDED)
            part += _of_signs(
                corner + HALF * HEAD_DIM, q_high, HALF - begin, KEY_CHUNK, HALF, HEAD_DIM, PADDED
            )
            part = part * HEAD_DIM**-0.5
        else:
            largest = tl.maximum(tl.max(low_size, 0), tl.max(high_size, 0))
            inside = (begin + inner < HALF)[:, None] & present[None, :]
            place = (half * HALF + begin + inner)[:, None]
            part = tl.load(q_rows[None, :] + place, mask=inside, other=0.0).to(tl.float32)
            if BALANCED:
                of_place = (key_balance + kv_head * HEAD_DIM)[None, :] + place
                part *= inverse_power(tl.load(of_place, mask=inside, other=1.0))
        largest = tl.where(largest > 0, largest, 1.0)
        part16 = (part / largest[None, :]).to(tl.float16)
        to = prepared + (group * ROWS + own) * (2 * CHUNKS * KEY_CHUNK)
        tl.store(to[None, :] + (chunk * KEY_CHUNK + inner)[:, None], part16, mask=present[None, :])
        of_chunk = factor + (4 + 2 * PADDED_PAIRS + chunk) * ROWS
        tl.store(of_chunk, tl.sum(part16.to(tl.float32), 0), mask=present)
        if chunk == 0:
            tl.store(factor, largest * scaling, mask=present)
    if OFFSET:
        if chunk == 2 * CHUNKS:
            constant = tl.zeros([HEADS_AT_ONCE], tl.float32)
            means = (key_offset + kv_head * HEAD_DIM)[None, :]
            if 2 * PAIRS < HEAD_DIM:
                whole = tl.arange(0, 2 * PADDED)
                beyond = ((whole >= 2 * PAIRS) & (whole < HEAD_DIM))[:, None] & present[None, :]
                of_rest = tl.load(q_rows[None, :] + whole[:, None], mask=beyond, other=0.0).to(tl.float32)
                constant += tl.sum(of_rest * tl.load(means + whole[:, None], mask=beyond, other=0.0), 0)
            tl.store(factor + 2 * ROWS, constant * scaling, mask=present)
            if PAIRS > 0:
                pair = tl.arange(0, PADDED_PAIRS)[:, None]
                here = (pair < PAIRS) & present[None, :]
                first_q = tl.load(q_rows[None, :] + pair, mask=here, other=0.0).to(tl.float32)
                second_q = tl.load(q_rows[None, :] + (pair + PAIRS), mask=here, other=0.0).to(tl.float32)
                first_mean = tl.load(means + pair, mask=here, other=0.0) * rope_scale
                second_mean = tl.load(means + (pair + PAIRS), mask=here, other=0.0) * rope_scale
                along = first_q * first_mean + second_q * second_mean
                across = second_q * first_mean - first_q * second_mean
                # No turn makes them larger than this.
                bound = tl.sqrt(tl.max(along * along + across * across, 0))
                bound = tl.where(bound > 0, bound, 1.0)
                to_pairs = factor[None, :] + (4 + pair) * ROWS
                tl.store(to_pairs, along / bound[None, :], mask=present[None, :])
                tl.store(to_pairs + PADDED_PAIRS * ROWS, across / bound[None, :], mask=present[None, :])
                tl.store(factor + ROWS, bound * scaling, mask=present)
            if SINK:
                every = tl.arange(0, 2 * PADDED)
                of_head = (every < HEAD_DIM)[:, None] & present[None, :]
                whole_q = tl.load(q_rows[None, :] + every[:, None], mask=of_head, other=0.0).to(tl.float32)
                sinks = (key_sink + kv_head * HEAD_DIM)[None, :]
                less = tl.load(sinks + every[:, None], mask=of_head, other=0.0)
                less -= tl.load(means + every[:, None], mask=of_head, other=0.0)
                less = tl.where((every < 2 * PAIRS)[:, None], less * rope_scale, less)
                tl.store(factor + 3 * ROWS, tl.sum(whole_q * less, 0) * scaling, mask=present)
    if PAIRS > 0:
        if (chunk == 2 * CHUNKS + 1) & (tl.program_id(1) == 0):
            turning = tl.arange(0, PADDED_PAIRS)
            frequency = tl.load(frequencies + turning, mask=turning < PAIRS, other=0.0) * 0.15915494309189535
            step = tl.arange(0, TILE)
            cos, sin = turned(step.to(tl.float32)[:, None] * frequency.to(tl.float32)[None, :])
            to_steps = steps + step[:, None] * PADDED_PAIRS + turning[None, :]
            tl.store(to_steps, cos.to(tl.float16))
            tl.store(to_steps + TILE * PADDED_PAIRS, sin.to(tl.float16))


@triton.jit
def _attend_kernel(
    prepared,
    factors,
    steps,
    key_codes,
    key_scale,
    key_minimum,
    value_codes,
    value_scale,
    value_minimum,
    lengths,
    table,
    mask,
    value_offset,
    frequencies,
    shift,
    output,
    statistics,
    length_stride,
    added,
    table_stride,
    mask_stride_batch,
    mask_stride_token,
    mask_columns,
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
    softcap,
    window,
    splits,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEY_BITS: tl.constexpr,
    KEY_GROUPS: tl.constexpr,
    KEY_MINIMUM: tl.constexpr,
    KEY_CHUNK: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    VALUE_MINIMUM: tl.constexpr,
    VALUE_CHUNK: tl.constexpr,
    OFFSET: tl.constexpr,
    SINK: tl.constexpr,
    VALUE_OFFSET: tl.constexpr,
    PAIRS: tl.constexpr,
    PADDED_PAIRS: tl.constexpr,
    SHIFTED: tl.constexpr,
    PAGED: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WHOLE: tl.constexpr,
    TILE: tl.constexpr,
):
    """One key-value head of one sequence, one part of its keys, all queries that read it.

    Column ``r`` of the products is token ``r // SHARED``, head ``r % SHARED`` of those that share the key:
    keys are the rows, of which a matrix unit wants 16, where it is content with 8 columns. Channels are taken
    in chunks of one scale each.
    ``WHOLE``: the part is all, and the result is written; else unscaled sums with their maximum and weight,
    the sums only where there are keys.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    KEY_CHUNKS: tl.constexpr = (HALF + KEY_CHUNK - 1) // KEY_CHUNK
    VALUE_CHUNKS: tl.constexpr = (HALF + VALUE_CHUNK - 1) // VALUE_CHUNK
    split = tl.program_id(0)
    kv_head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    row = tl.arange(0, ROWS)
    token = row // SHARED
    head = kv_head * SHARED + row % SHARED
    present = row < TOKENS * SHARED

    total = tl.load(lengths + batch * length_stride) + added
    begin = 0
    if WINDOW:
        begin = tl.maximum(total - TOKENS + 1 - window, 0) // TILE * TILE
    share = tl.cdiv(tl.cdiv(total - begin, TILE), splits) * TILE
    begin = begin + split * share
    end = tl.minimum(begin + share, total)
    last = total - TOKENS + token
    if not WHOLE:
        part_of_row = ((batch * TOKENS + token) * HEADS + head) * splits + split
        if begin >= end:
            tl.store(statistics + part_of_row * 2, tl.full([ROWS], float("-inf"), tl.float32), mask=present)
            tl.store(statistics + part_of_row * 2 + 1, tl.zeros([ROWS], tl.float32), mask=present)
            return

    group = batch * tl.num_programs(1) + kv_head
    factors += group * ((4 + 2 * PADDED_PAIRS + 2 * KEY_CHUNKS) * ROWS) + row
    if OFFSET:
        of_constant = tl.load(factors + 2 * ROWS, mask=present, other=0.0)
        if SINK:
            of_sink = tl.load(factors + 3 * ROWS, mask=present, other=0.0)
            zeroth = 0
            if SHIFTED:
                zeroth -= tl.load(shift + batch)
        if PAIRS > 0:
            of_turned = tl.load(factors + ROWS, mask=present, other=0.0)
            pair = tl.arange(0, PADDED_PAIRS)
            row_of_pair = (4 + pair)[:, None] * ROWS
            of_pairs = factors[None, :] + row_of_pair
            along = tl.load(of_pairs, mask=present[None, :], other=0.0)
            across = tl.load(of_pairs + PADDED_PAIRS * ROWS, mask=present[None, :], other=0.0)
            frequency = tl.load(frequencies + pair, mask=pair < PAIRS, other=0.0) * 0.15915494309189535
            position = begin
            if SHIFTED:
                position += tl.load(shift + batch)
            cos, sin = turned(position.to(tl.float64) * frequency)
            near = along * cos[:, None] + across * sin[:, None]
            far = across * cos[:, None] - along * sin[:, None]
            tile_cos, tile_sin = turned(frequency * TILE)
            step = steps + tl.arange(0, TILE)[:, None] * PADDED_PAIRS + pair[None, :]
            step_cos = tl.load(step)
            step_sin = tl.load(step + TILE * PADDED_PAIRS)
    queries = ()
    inner = tl.arange(0, KEY_CHUNK)
    row_of_q = prepared + (group * ROWS + row) * (2 * KEY_CHUNKS * KEY_CHUNK)
    for chunk in tl.static_range(2 * KEY_CHUNKS):
        place_of_q = row_of_q[None, :] + (chunk * KEY_CHUNK + inner)[:, None]
        queries = queries + (tl.load(place_of_q, mask=present[None, :], other=0.0),)
    factor = tl.load(factors, mask=present, other=0.0)

    best = tl.full([ROWS], float("-inf"), tl.float32)
    weights = tl.zeros([TILE, ROWS], tl.float32)
    sums = ()
    for _ in tl.static_range(2 * VALUE_CHUNKS):
        sums = sums + (tl.zeros([VALUE_CHUNK, ROWS], tl.float32),)
    for start in tl.range(begin, end, TILE):
        key = start + tl.arange(0, TILE)
        valid = key < end
        if PAGED:
            block = tl.load(table + batch * table_stride + key // BLOCK_SIZE, mask=valid, other=0).to(
                tl.int64
            )
            place = key % BLOCK_SIZE
        else:
            block = batch
            place = key
        code_rows = block * key_stride_block + kv_head * key_stride_head + place * key_stride_token
        scale_rows = (
            block * key_scale_stride_block + kv_head * key_scale_stride_head + place * key_scale_stride_token
        )
        logits = tl.zeros([TILE, ROWS], tl.float32)
        for chunk in tl.static_range(KEY_CHUNKS):
            low, high = dequantized_chunk(
                key_codes, key_scale, key_minimum, code_rows, scale_rows, valid, chunk,
                KEY_BITS, HEAD_DIM // KEY_GROUPS, HALF, KEY_CHUNK, KEY_MINIMUM,
            )  # fmt: skip
            logits = tl.dot(low, queries[chunk], logits)
            logits = tl.dot(high, queries[KEY_CHUNKS + chunk], logits)
        logits = logits * factor[None, :]
        if OFFSET:
            if PAIRS > 0:
                of_offset = tl.dot(step_cos, near.to(tl.float16))
                of_offset = tl.dot(step_sin, far.to(tl.float16), of_offset)
                logits += of_offset * of_turned[None, :]
                old = near
                near = old * tile_cos[:, None] + far * tile_sin[:, None]
                far = far * tile_cos[:, None] - old * tile_sin[:, None]
            logits += of_constant[None, :]
            if SINK:
                logits += tl.where((key == zeroth)[:, None], of_sink[None, :], 0.0)
        if SOFTCAP:
            # tanh by its exponential, whose argument is kept where it does not overflow.
            power = tl.exp2(tl.minimum(tl.abs(logits) / softcap, 30.0) * (2 * _LOG2E))
            size = softcap * (1.0 - 2.0 / (power + 1.0))
            logits = tl.where(logits < 0, -size, size)
        seen = valid
        if MASKED and TOKENS == 1:
            flags = tl.load(
                mask + batch * mask_stride_batch + key, mask=valid & (key < mask_columns), other=1
            )
            seen = seen & (flags != 0)
        seen = seen[:, None] & (key[:, None] <= last[None, :])
        if WINDOW:
            seen = seen & (key[:, None] > last[None, :] - window)
        if MASKED and TOKENS > 1:
            shown = valid & (key < mask_columns)
            flags = tl.load(
                mask + batch * mask_stride_batch + (token * mask_stride_token)[None, :] + key[:, None],
                mask=shown[:, None] & present[None, :],
                other=1,
            )
            seen = seen & (flags != 0)
        logits = tl.where(seen, logits * _LOG2E, float("-inf"))
        top = tl.maximum(best, tl.max(logits, 0))
        safe = tl.where(top == float("-inf"), 0.0, top)
        kept = tl.exp2(best - safe)
        part = tl.exp2(logits - safe[None, :])
        weights = weights * kept[None, :] + part
        best = top
        part16 = part.to(tl.float16)
        code_rows = block * value_stride_block + kv_head * value_stride_head + place * value_stride_token
        scale_rows = (
            block * value_scale_stride_block
            + kv_head * value_scale_stride_head
            + place * value_scale_stride_token
        )
        low_sums = ()
        high_sums = ()
        for chunk in tl.static_range(VALUE_CHUNKS):
            low, high = dequantized_chunk(
                value_codes, value_scale, value_minimum, code_rows, scale_rows, valid, chunk,
                VALUE_BITS, HEAD_DIM // VALUE_GROUPS, HALF, VALUE_CHUNK, VALUE_MINIMUM,
            )  # fmt: skip
            low_sums = low_sums + (tl.dot(low.trans(), part16, sums[chunk] * kept[None, :]),)
            high_sums = high_sums + (
                tl.dot(high.trans(), part16, sums[VALUE_CHUNKS + chunk] * kept[None, :]),
            )
        sums = low_sums + high_sums

    weight = tl.sum(weights, 0)
    nothing = weight[None, :] == 0
    if WHOLE:
        out = output + ((batch * TOKENS + token) * HEADS + head) * HEAD_DIM
    else:
        tl.store(statistics + part_of_row * 2, best, mask=present)
        tl.store(statistics + part_of_row * 2 + 1, weight, mask=present)
        out = output + part_of_row * HEAD_DIM
    inner = tl.arange(0, VALUE_CHUNK)
    for half in tl.static_range(2):
        for chunk in tl.static_range(VALUE_CHUNKS):
            first_channel = half * HALF + chunk * VALUE_CHUNK
            inside = chunk * VALUE_CHUNK + inner < HALF
            result = sums[half * VALUE_CHUNKS + chunk]
            if WHOLE:
                # As the parts are combined, so that one part is no other result than all.
                result = tl.where(nothing, 0.0, result / tl.where(nothing, 1.0, weight[None, :]))
                if VALUE_OFFSET:
                    mean = value_offset + kv_head * HEAD_DIM + first_channel
                    of_mean = tl.load(mean + inner, mask=inside, other=0.0)[:, None]
                    result += tl.where(nothing, 0.0, of_mean)
            tl.store(
                out[None, :] + (first_channel + inner)[:, None],
                result.to(output.dtype.element_ty),
                mask=inside[:, None] & present[None, :],
            )


@triton.jit
def _combine_kernel(
    parts,
    statistics,
    value_offset,
    output,
    splits,
    HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    VALUE_OFFSET: tl.constexpr,
):
    """Some channels of one head of one token from its parts."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    real = split < splits
    channel = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = channel < HEAD_DIM
    best = tl.load(statistics + (row * splits + split) * 2, mask=real, other=float("-inf"))
    weight = tl.load(statistics + (row * splits + split) * 2 + 1, mask=real, other=0.0)
    top = tl.max(best, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    factor = tl.exp2(best - top)
    # A part that saw nothing has -inf for its maximum, and NaN's maximum is passed over: its weight is NaN.
    factor = tl.where(weight == 0, 0.0, factor)
    total = tl.sum(weight * factor, 0)
    x = tl.load(
        parts + (row * splits + split)[:, None] * HEAD_DIM + channel[None, :],
        mask=(real & (weight != 0))[:, None] & inside[None, :],
        other=0.0,
    )
    result = tl.sum(x * factor[:, None], 0)
    result = tl.where(total == 0, 0.0, result / tl.where(total == 0, 1.0, total))
    if VALUE_OFFSET:
        kv_head = row % HEADS // SHARED
        mean = tl.load(value_offset + kv_head * HEAD_DIM + channel, mask=inside, other=0.0)
        result += tl.where(total == 0, 0.0, mean)
    tl.store(output + row * HEAD_DIM + channel, result.to(output.dtype.element_ty), mask=inside)


def _suits_warps(
    key_codes: Tensor,
    key_scale: Tensor,
    key_minimum: Tensor | None,
    value_codes: Tensor,
    value_scale: Tensor,
    value_minimum: Tensor | None,
    rows: int,
) -> bool:
    """Whether the kernel of warps can read this cache: the default recipe's, if rows are aligned to words."""
    if key_minimum is not None or value_minimum is not None or rows > 8 or key_codes.shape[2] % 16:
        return False
    for codes, scale in ((key_codes, key_scale), (value_codes, value_scale)):
        if codes.shape[-1] not in (32, 64) or scale.shape[-1] * GROUP != 2 * codes.shape[-1]:
            return False
        # Rows are read by 8 bytes, scales by all of a row.
        if any(stride % 8 for stride in (*codes.stride()[:3], codes.data_ptr())):
            return False
        if any(stride % scale.shape[-1] for stride in scale.stride()[:3]) or scale.data_ptr() % 8:
            return False
    return True


@cache_attend.kernel(
    "triton",
    Constraints.on_gpu(
        dtypes={"query": frozenset({torch.float16, torch.bfloat16, torch.float32})},
        at_most={"tokens": QUERIES, "head_dim": 256},
        divisible={"head_dim": 2},
    ),
)
def _launch(
    query: Tensor,
    key_codes: Tensor,
    key_scale: Tensor,
    key_minimum: Tensor | None,
    value_codes: Tensor,
    value_scale: Tensor,
    value_minimum: Tensor | None,
    lengths: Tensor,
    added: int,
    block_table: Tensor | None,
    mask: Tensor | None,
    signs: Tensor | None,
    key_offset: Tensor | None,
    key_sink: Tensor | None,
    key_balance: Tensor | None,
    value_offset: Tensor | None,
    frequencies: Tensor | None,
    rope_scale: float,
    shift: Tensor | None,
    scaling: float,
    softcap: float,
    window: int,
    output: Tensor,
) -> None:
    batch, tokens, heads, head_dim = query.shape
    if query.stride(3) != 1:
        query = query.contiguous()
    if mask is not None and mask.stride(3) != 1:
        mask = mask.contiguous()
    if output.numel() == 0:
        return
    result = output
    if not output.is_contiguous():
        result = torch.empty_like(output, memory_format=torch.contiguous_format)
    kv_heads, block_size = key_codes.shape[1], key_codes.shape[2]
    longest = block_size if block_table is None else block_size * block_table.shape[1]
    visible = min(longest, window + tokens + _TILE) if window else longest
    programs = batch * kv_heads
    tiles = ceil_div(visible, _TILE)
    padded = max(next_power_of_two(head_dim // 2), 16)
    pairs = 0 if frequencies is None or key_offset is None else frequencies.shape[0]
    rows = max(next_power_of_two(tokens * (heads // kv_heads)), 8)
    by_warps = _suits_warps(key_codes, key_scale, key_minimum, value_codes, value_scale, value_minimum, rows)
    if mask is not None or softcap or not COMPILED:
        by_warps = False
    # One warp a program is the most a GPU gets done; where it is not filled, two are done sooner.
    warps = max(1 if programs * tiles >= 4 * processors(query.device) or by_warps else 2, rows // 16)
    # As many parts as run at once, and none that would run after all others.
    splits = max(1, min(_WARPS * processors(query.device) // (warps * programs), tiles, _MOST_SPLITS))
    whole = splits == 1
    chunk = chunk_size(head_dim, head_dim // key_scale.shape[-1])
    chunks = 2 * ceil_div(head_dim // 2, chunk)
    padded_pairs = max(next_power_of_two(max(pairs, 1)), 16)
    prepared = torch.empty((programs, rows, chunks * chunk), dtype=torch.float16, device=query.device)
    factors = torch.empty(
        (programs, 4 + 2 * padded_pairs + chunks, rows), dtype=torch.float32, device=query.device
    )
    rows_of_all = batch * tokens * heads
    at_once = 16 if rows_of_all <= _FEW_ROWS else 64
    steps = torch.empty((2, _TILE, padded_pairs), dtype=torch.float16, device=query.device)
    columns = chunks + (key_offset is not None) + (pairs > 0)
    _prepare_kernel[(columns, ceil_div(rows_of_all, at_once))](
        query,
        signs,
        key_offset,
        key_sink,
        key_balance,
        frequencies,
        prepared,
        factors,
        steps,
        rows_of_all,
        scaling,
        rope_scale,
        *query.stride()[:3],
        TOKENS=tokens,
        HEADS=heads,
        SHARED=heads // kv_heads,
        HEAD_DIM=head_dim,
        PADDED=padded,
        ROWS=rows,
        KEY_CHUNK=chunk,
        ROTATED=signs is not None,
        BALANCED=key_balance is not None,
        OFFSET=key_offset is not None,
        SINK=key_offset is not None and key_sink is not None,
        PAIRS=pairs,
        PADDED_PAIRS=padded_pairs,
        HEADS_AT_ONCE=at_once,
        TILE=_TILE,
        num_warps=4,
    )
    sums, statistics = result, result
    if not whole:
        parts = batch * tokens * heads * splits
        sums = torch.empty((parts, head_dim), dtype=torch.float32, device=query.device)
        statistics = torch.empty((parts, 2), dtype=torch.float32, device=query.device)
    if by_warps:
        turned_offsets = None
        if pairs:
            turned_offsets = torch.empty(
                (programs * splits, _SPAN, rows), dtype=torch.float32, device=query.device
            )
        words = (
            key_codes.view(torch.int32),
            key_scale.view(torch.int32),
            value_codes.view(torch.int32),
            value_scale.view(torch.int32),
        )
        attend_by_warps[(splits, kv_heads, batch)](
            prepared.view(torch.int64),
            factors,
            steps,
            *words,
            lengths,
            block_table,
            value_offset,
            frequencies,
            shift,
            turned_offsets,
            sums,
            statistics,
            0 if lengths.shape[0] == 1 else 1,
            added,
            0 if block_table is None else block_table.stride(0),
            *(stride for word in words for stride in word.stride()[:2]),
            window,
            splits,
            *(word.stride(2) for word in words),
            BLOCK_SIZE=block_size if block_table is not None else 1,
            TOKENS=tokens,
            HEADS=heads,
            SHARED=heads // kv_heads,
            HEAD_DIM=head_dim,
            USED=next_power_of_two(tokens * (heads // kv_heads)),
            OFFSET=key_offset is not None,
            SINK=key_offset is not None and key_sink is not None,
            VALUE_OFFSET=value_offset is not None,
            PAIRS=pairs,
            PADDED_PAIRS=padded_pairs,
            SHIFTED=shift is not None,
            PAGED=block_table is not None,
            WINDOW=window > 0,
            WHOLE=whole,
            SPAN=_SPAN,
            num_warps=1,
            num_stages=1,
        )
    else:
        _attend_kernel[(splits, kv_heads, batch)](
            prepared,
            factors,
            steps,
            key_codes,
            key_scale,
            key_minimum,
            value_codes,
            value_scale,
            value_minimum,
            lengths,
            block_table,
            mask,
            value_offset,
            frequencies,
            shift,
            sums,
            statistics,
            0 if lengths.shape[0] == 1 else 1,
            added,
            0 if block_table is None else block_table.stride(0),
            0 if mask is None or mask.shape[0] == 1 else mask.stride(0),
            0 if mask is None or mask.shape[2] == 1 else mask.stride(2),
            0 if mask is None else mask.shape[3],
            *key_codes.stride()[:3],
            *key_scale.stride()[:3],
            *value_codes.stride()[:3],
            *value_scale.stride()[:3],
            softcap,
            window,
            splits,
            BLOCK_SIZE=block_size if block_table is not None else 1,
            TOKENS=tokens,
            HEADS=heads,
            SHARED=heads // kv_heads,
            HEAD_DIM=head_dim,
            ROWS=rows,
            KEY_BITS=key_codes.shape[-1] * 8 // head_dim,
            KEY_GROUPS=key_scale.shape[-1],
            KEY_MINIMUM=key_minimum is not None,
            KEY_CHUNK=chunk,
            VALUE_BITS=value_codes.shape[-1] * 8 // head_dim,
            VALUE_GROUPS=value_scale.shape[-1],
            VALUE_MINIMUM=value_minimum is not None,
            VALUE_CHUNK=chunk_size(head_dim, head_dim // value_scale.shape[-1]),
            OFFSET=key_offset is not None,
            SINK=key_offset is not None and key_sink is not None,
            VALUE_OFFSET=value_offset is not None,
            PAIRS=pairs,
            PADDED_PAIRS=padded_pairs,
            SHIFTED=shift is not None,
            PAGED=block_table is not None,
            MASKED=mask is not None,
            WINDOW=window > 0,
            SOFTCAP=softcap > 0,
            WHOLE=whole,
            TILE=_TILE,
            num_warps=warps,
            num_stages=_STAGES,
        )
    if not whole:
        _combine_kernel[(batch * tokens * heads, ceil_div(head_dim, _COMBINED))](
            sums,
            statistics,
            value_offset,
            result,
            splits,
            HEADS=heads,
            SHARED=heads // kv_heads,
            HEAD_DIM=head_dim,
            CHUNK=_COMBINED,
            SPLITS=next_power_of_two(splits),
            VALUE_OFFSET=value_offset is not None,
            num_warps=4,
        )
    if result is not output:
        output.copy_(result)
