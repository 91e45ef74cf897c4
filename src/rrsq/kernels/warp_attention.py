"""Attention from 4-bit codes for decoding, by single warps: what :mod:`.cache_attend` takes on a GPU.

Each value of this kernel is a tensor of 32 numbers, one a lane: it says what each lane has in its
registers, where a kernel of tiles leaves that to Triton. So codes go from memory to the lane whose part of
the matrix unit's operand they are, and are unpacked there. They do not pass through shared memory, which is
what the kernel of tiles is busiest with.

Operands of ``mma.m16n8k16`` (PTX ISA, "Matrix fragments"), of lane ``4 g + t``: ``A`` has rows ``g`` and
``g + 8``, ``B`` column ``g``, both the entries ``2 t``, ``2 t + 1``, ``2 t + 8`` and ``2 t + 9`` along the
sum; ``C`` has rows ``g`` and ``g + 8``, columns ``2 t`` and ``2 t + 1``. Columns are queries, 8 at most;
a lane's two columns are *first* and *second* below. For logits rows are keys, and any order of channels will
do as long as queries have the same one. For the result rows are channels, and the sum is over keys.

A code stands for ``n - 8`` and is read as ``64 + n``, by its bits in the mantissa of 64. Of keys, a group's
``72 sum q`` is subtracted where its sum begins, and its scale multiplies that sum.

Triton's interpreter does not run inline assembly. What there is of it is few instructions, which the tests
execute for all 32 lanes.
"""

# Tuples of tensors grow by one at a time, and kernels cannot unpack them.
# ruff: noqa: RUF005
# mypy: disallow-untyped-defs=False, check-untyped-defs=False
# mypy: disable-error-code="assignment, var-annotated, misc"

from __future__ import annotations

from ._triton import tl, triton
from .cache import turned as turned_by

__all__ = ["GROUP", "TILE", "attend_by_warps", "turn_offsets"]

TILE = 32
"""Keys at a time."""
GROUP = 32
"""Channels that have a scale."""
_TILE = tl.constexpr(TILE)
_LOG2E = tl.constexpr(1.4426950408889634)
_BASE = tl.constexpr(72.0)


def _unpacked(word: str, results: tuple[str, str, str, str]) -> str:
    """Nibbles at bits 0, 4, 8 and 12 of each half of a word, and 64: four times two numbers of 16 bits."""
    shifted = ("shl.b32 s, {}, 4;", "mov.b32 s, {};", "shr.u32 s, {}, 4;", "shr.u32 s, {}, 8;")
    lines = []
    for result, shift in zip(results, shifted, strict=True):
        lines += [shift.format(word), f"lop3.b32 {result}, s, 0x00F000F0, 0x54005400, 0xEA;"]
    return " ".join(lines)


_KEY_WORD = tl.constexpr("{.reg .b32 s; " + _unpacked("$4", ("$0", "$1", "$2", "$3")) + "}")
_VALUE_WORDS = tl.constexpr(
    "{.reg .b32 s, x, y, z; mov.b32 z, 0x54805480; prmt.b32 x, $8, $9, 0x5410; prmt.b32 y, $8, $9, 0x7632; "
    + _unpacked("x", ("$0", "$4", "$1", "$5"))
    + " "
    + _unpacked("y", ("$2", "$6", "$3", "$7"))
    + " "
    + " ".join(f"sub.f16x2 ${index}, ${index}, z;" for index in range(8))
    + " "
    + " ".join(f"mul.f16x2 ${index}, ${index}, ${10 if index < 4 else 11};" for index in range(8))
    + "}"
)
_MMA = tl.constexpr(
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
    "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
)


@triton.jit
def _mma(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    return tl.inline_asm_elementwise(
        _MMA,
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _key_numbers(word):
    """Of a word of a key two of the lower channels, two of the higher, and again: ``64 + n``."""
    return tl.inline_asm_elementwise(
        _KEY_WORD,
        "=&r,=&r,=&r,=&r,r",
        [word],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _value_numbers(first, second, low_scales, high_scales):
    """Of words of two keys pairs of values: of four of the lower channels, then of four of the higher."""
    return tl.inline_asm_elementwise(
        _VALUE_WORDS,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r",
        [first, second, low_scales, high_scales],
        dtype=(tl.int32,) * 8,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _lower_halves(first, second):
    """The lower 16 bits of two words."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [first, second], tl.int32, True, 1
    )


@triton.jit
def _upper_halves(first, second):
    """The upper 16 bits of two words."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", [first, second], tl.int32, True, 1
    )


@triton.jit
def _halves_by(first, second, selector):
    """Two words' lower or upper 16 bits, as a lane's selector says."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [first, second, selector], tl.int32, True, 1
    )


@triton.jit
def _halves(x):
    """The two words of 8 bytes."""
    return tl.inline_asm_elementwise(
        "mov.b64 {$0, $1}, $2;", "=r,=r,l", [x], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
    )


@triton.jit
def _floats(x):
    """The two float16 of a word, float32."""
    return tl.inline_asm_elementwise(
        "{.reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h;}",
        "=f,=f,r",
        [x],
        dtype=(tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _transposed(first, second):
    """Of 8 x 8 numbers, of which a lane has ``[g, 2 t]`` and ``[g, 2 t + 1]``, the columns, as float16."""
    return tl.inline_asm_elementwise(
        "{.reg .b32 p; cvt.rn.f16x2.f32 p, $2, $1; movmatrix.sync.aligned.m8n8.trans.b16 $0, p;}",
        "=r,f,f",
        [first, second],
        tl.int32,
        True,
        1,
    )


@triton.jit
def _largest(x):
    """The largest of the lanes with the same ``t``. NaN is passed over."""
    return tl.inline_asm_elementwise(
        """{.reg .f32 y; mov.f32 $0, $1;
        shfl.sync.bfly.b32 y, $0, 4, 0x1f, 0xffffffff; max.f32 $0, $0, y;
        shfl.sync.bfly.b32 y, $0, 8, 0x1f, 0xffffffff; max.f32 $0, $0, y;
        shfl.sync.bfly.b32 y, $0, 16, 0x1f, 0xffffffff; max.f32 $0, $0, y;}""",
        "=&f,f",
        [x],
        tl.float32,
        True,
        1,
    )


@triton.jit
def _total(x):
    """The sum over the lanes with the same ``t``."""
    return tl.inline_asm_elementwise(
        """{.reg .f32 y; mov.f32 $0, $1;
        shfl.sync.bfly.b32 y, $0, 4, 0x1f, 0xffffffff; add.f32 $0, $0, y;
        shfl.sync.bfly.b32 y, $0, 8, 0x1f, 0xffffffff; add.f32 $0, $0, y;
        shfl.sync.bfly.b32 y, $0, 16, 0x1f, 0xffffffff; add.f32 $0, $0, y;}""",
        "=&f,f",
        [x],
        tl.float32,
        True,
        1,
    )


@triton.jit
def _block(table, batch, first, end, BLOCK_SIZE: tl.constexpr, PAGED: tl.constexpr):
    """The block, int64, and the row of it in which 16 cached tokens begin; the first, if there are none."""
    if PAGED:
        block = tl.load(table + first // BLOCK_SIZE, mask=first < end, other=0).to(tl.int64)
        place = first % BLOCK_SIZE
    else:
        block = batch
        place = tl.where(first < end, first, 0)
    return block, place


@triton.jit
def _two_words(pointer):
    """8 bytes of a lane, int32."""
    return _halves(tl.load(pointer.to(tl.pointer_type(tl.int64), bitcast=True)))


@triton.jit
def _scale_words(pointer, there, GROUPS: tl.constexpr):
    """All scales of a token, two a word; 0 if it is not ``there``."""
    if GROUPS == 1:
        words = (tl.load(pointer, mask=there, other=0),)
    else:
        words = _halves(tl.load(pointer.to(tl.pointer_type(tl.int64), bitcast=True), mask=there, other=0))
    return words


@triton.jit
def _keys(codes, scales, own, pair, ROW: tl.constexpr, SCALE_ROW: tl.constexpr, GROUPS: tl.constexpr):
    """Codes and scales of the keys ``own`` and ``own + 8``, words: two of each group of 8, and all scales.

    ``ROW``, ``SCALE_ROW``: words from one token to the next.
    """
    words = ()
    scale_words = ()
    for half in tl.static_range(2):
        for group in tl.static_range(GROUPS):
            first, second = _two_words(codes + (own * ROW + 2 * pair) + (8 * half * ROW + 8 * group))
            words = words + (first, second)
        row = scales + own * SCALE_ROW + 8 * half * SCALE_ROW
        of_row = _scale_words(row, own >= 0, GROUPS)
        for each in tl.static_range(GROUPS):
            scale_words = scale_words + (of_row[each],)
    return words, scale_words


@triton.jit
def _values(codes, scales, left, own, pair, ROW: tl.constexpr, SCALE_ROW: tl.constexpr, GROUPS: tl.constexpr):
    """Codes and scales of values ``2 pair``, ``+ 1``, ``+ 8`` and ``+ 9``: ``GROUPS`` words, and all scales.

    ``left``: how many tokens there are. Of others scales are 0, whatever was left in the memory.
    """
    words = ()
    scale_words = ()
    for index in tl.static_range(4):
        row = codes + (2 * pair * ROW + GROUPS * own) + (index % 2 + 8 * (index // 2)) * ROW
        if GROUPS == 1:
            words = words + (tl.load(row),)
        else:
            first, second = _two_words(row)
            words = words + (first, second)
        row_of_scale = scales + 2 * pair * SCALE_ROW + (index % 2 + 8 * (index // 2)) * SCALE_ROW
        there = 2 * pair + (index % 2 + 8 * (index // 2)) < left
        of_row = _scale_words(row_of_scale, there, GROUPS)
        for each in tl.static_range(GROUPS):
            scale_words = scale_words + (of_row[each],)
    return words, scale_words


@triton.jit
def _pairs_of_scales(scales, index: tl.constexpr, selector, GROUPS: tl.constexpr):
    """Scales of tokens ``index`` and ``index + 1``, of a lane's lower channels and of its higher."""
    if GROUPS == 1:
        low = _lower_halves(scales[index], scales[index + 1])
        high = _upper_halves(scales[index], scales[index + 1])
    else:
        low = _halves_by(scales[2 * index], scales[2 * index + 2], selector)
        high = _halves_by(scales[2 * index + 1], scales[2 * index + 3], selector)
    return low, high


@triton.jit
def turn_offsets(
    factors,
    steps,
    frequencies,
    shift,
    turned,
    begin,
    end,
    batch,
    USED: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    PADDED_PAIRS: tl.constexpr,
    SHIFTED: tl.constexpr,
    TILE: tl.constexpr,
):
    """``q · RoPE_p(mu) / ln 2`` of the keys from ``begin`` to ``end``, float32 ``[keys, ROWS]``.

    Of the channels that RoPE turns, a span of keys at a time: together with the logits of codes it would take
    more registers than there are. The ``ROWS`` columns of a product are as many tiles of keys as the ``USED``
    queries leave room for.
    """
    column = tl.arange(0, ROWS)
    own = column % USED
    tile = column // USED
    factor = tl.load(factors + ROWS + own) * _LOG2E
    pair = tl.arange(0, PADDED_PAIRS)
    of_pairs = (factors + own)[None, :] + (4 + pair)[:, None] * ROWS
    along = tl.load(of_pairs)
    across = tl.load(of_pairs + PADDED_PAIRS * ROWS)
    frequency = tl.load(frequencies + pair, mask=pair < PAIRS, other=0.0) * 0.15915494309189535
    position = begin + tile * TILE
    if SHIFTED:
        position += tl.load(shift + batch)
    cos, sin = turned_by(position.to(tl.float64)[None, :] * frequency[:, None])
    near = along * cos + across * sin
    far = across * cos - along * sin
    tile_cos, tile_sin = turned_by(frequency * (TILE * (ROWS // USED)))
    within = tl.arange(0, TILE)
    step = steps + within[:, None] * PADDED_PAIRS + pair[None, :]
    step_cos = tl.load(step)
    step_sin = tl.load(step + TILE * PADDED_PAIRS)
    for start in tl.range(begin, end, TILE * (ROWS // USED), num_stages=1):
        product = tl.dot(step_cos, near.to(tl.float16))
        product = tl.dot(step_sin, far.to(tl.float16), product)
        key = start - begin + tile[None, :] * TILE + within[:, None]
        tl.store(turned + key * ROWS + own[None, :], product * factor[None, :])
        old = near
        near = old * tile_cos[:, None] + far * tile_sin[:, None]
        far = far * tile_cos[:, None] - old * tile_sin[:, None]


@triton.jit
def attend_by_warps(
    prepared,
    factors,
    steps,
    key_codes,
    key_scale,
    value_codes,
    value_scale,
    lengths,
    table,
    value_offset,
    frequencies,
    shift,
    turned_offsets,
    output,
    statistics,
    length_stride,
    added,
    table_stride,
    key_stride_block,
    key_stride_head,
    key_scale_stride_block,
    key_scale_stride_head,
    value_stride_block,
    value_stride_head,
    value_scale_stride_block,
    value_scale_stride_head,
    window,
    splits,
    KEY_ROW: tl.constexpr,
    KEY_SCALE_ROW: tl.constexpr,
    VALUE_ROW: tl.constexpr,
    VALUE_SCALE_ROW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    USED: tl.constexpr,
    OFFSET: tl.constexpr,
    SINK: tl.constexpr,
    VALUE_OFFSET: tl.constexpr,
    PAIRS: tl.constexpr,
    PADDED_PAIRS: tl.constexpr,
    SHIFTED: tl.constexpr,
    PAGED: tl.constexpr,
    WINDOW: tl.constexpr,
    WHOLE: tl.constexpr,
    SPAN: tl.constexpr,
):
    """One key-value head of one sequence, one part of its keys, the up to 8 queries that read it.

    Arguments are those of the kernel of tiles in :mod:`.cache_attend`; codes and scales are int32, and
    strides count these. ``turned_offsets``: float32 ``[programs, SPAN, 8]``, written and read here.
    """
    ROWS: tl.constexpr = 8
    HALF: tl.constexpr = HEAD_DIM // 2
    GROUPS: tl.constexpr = HALF // 32
    split = tl.program_id(0)
    kv_head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    lane = tl.arange(0, 32)
    own = lane // 4
    pair = lane % 4
    first_column = 2 * pair
    second_column = first_column + 1
    first_there = first_column < TOKENS * SHARED
    second_there = second_column < TOKENS * SHARED

    total = tl.load(lengths + batch * length_stride) + added
    begin = 0
    if WINDOW:
        begin = tl.maximum(total - TOKENS + 1 - window, 0) // _TILE * _TILE
    share = tl.cdiv(tl.cdiv(total - begin, _TILE), splits) * _TILE
    begin = begin + split * share
    end = tl.minimum(begin + share, total)
    first_last = total - TOKENS + first_column // SHARED
    second_last = total - TOKENS + second_column // SHARED
    if not WHOLE:
        first_part = (
            (batch * TOKENS + first_column // SHARED) * HEADS + kv_head * SHARED
        ) + first_column % SHARED
        first_part = first_part * splits + split
        second_part = (
            (batch * TOKENS + second_column // SHARED) * HEADS + kv_head * SHARED
        ) + second_column % SHARED
        second_part = second_part * splits + split
        if begin >= end:
            tl.store(statistics + first_part * 2, tl.full([32], float("-inf"), tl.float32), mask=first_there)
            tl.store(
                statistics + second_part * 2, tl.full([32], float("-inf"), tl.float32), mask=second_there
            )
            tl.store(statistics + first_part * 2 + 1, tl.zeros([32], tl.float32), mask=first_there)
            tl.store(statistics + second_part * 2 + 1, tl.zeros([32], tl.float32), mask=second_there)
            return

    group = batch * tl.num_programs(1) + kv_head
    factors += group * ((4 + 2 * PADDED_PAIRS + 2 * GROUPS) * ROWS)
    first_factor = tl.load(factors + first_column, mask=first_there, other=0.0) * _LOG2E
    second_factor = tl.load(factors + second_column, mask=second_there, other=0.0) * _LOG2E
    if OFFSET:
        first_constant = tl.load(factors + 2 * ROWS + first_column, mask=first_there, other=0.0) * _LOG2E
        second_constant = tl.load(factors + 2 * ROWS + second_column, mask=second_there, other=0.0) * _LOG2E
        if SINK:
            first_sink = tl.load(factors + 3 * ROWS + first_column, mask=first_there, other=0.0) * _LOG2E
            second_sink = tl.load(factors + 3 * ROWS + second_column, mask=second_there, other=0.0) * _LOG2E
            zeroth = 0
            if SHIFTED:
                zeroth -= tl.load(shift + batch)
    queries = ()
    bases = ()
    row_of_q = prepared + (group * ROWS + own) * (HEAD_DIM // 4) + 2 * pair
    for chunk in tl.static_range(2 * GROUPS):
        for step in tl.static_range(2):
            four = _halves(tl.load(row_of_q + (8 * chunk + step), mask=own < TOKENS * SHARED, other=0))
            queries = queries + (_lower_halves(four[0], four[1]), _upper_halves(four[0], four[1]))
        of_chunk = factors + (4 + 2 * PADDED_PAIRS + chunk) * ROWS
        first_base = tl.load(of_chunk + first_column, mask=first_there, other=0.0) * -_BASE
        second_base = tl.load(of_chunk + second_column, mask=second_there, other=0.0) * -_BASE
        bases = bases + (first_base, second_base)

    first_best = tl.full([32], float("-inf"), tl.float32)
    second_best = tl.full([32], float("-inf"), tl.float32)
    first_weight = tl.zeros([32], tl.float32)
    second_weight = tl.zeros([32], tl.float32)
    sums = ()
    for _ in tl.static_range(16 * GROUPS):
        sums = sums + (tl.zeros([32], tl.float32),)

    if PAGED:
        table += batch * table_stride
    key_codes += kv_head * key_stride_head
    key_scale += kv_head * key_scale_stride_head
    value_codes += kv_head * value_stride_head
    value_scale += kv_head * value_scale_stride_head
    block, place = _block(table, batch, begin, end, BLOCK_SIZE, PAGED)
    other_block, other_place = _block(table, batch, begin + 16, end, BLOCK_SIZE, PAGED)
    keys, key_scales = _keys(
        key_codes + block * key_stride_block + place * KEY_ROW,
        key_scale + block * key_scale_stride_block + place * KEY_SCALE_ROW,
        own, pair, KEY_ROW, KEY_SCALE_ROW, GROUPS,
    )  # fmt: skip
    other_keys, other_key_scales = _keys(
        key_codes + other_block * key_stride_block + other_place * KEY_ROW,
        key_scale + other_block * key_scale_stride_block + other_place * KEY_SCALE_ROW,
        own, pair, KEY_ROW, KEY_SCALE_ROW, GROUPS,
    )  # fmt: skip
    values, value_scales = _values(
        value_codes + block * value_stride_block + place * VALUE_ROW,
        value_scale + block * value_scale_stride_block + place * VALUE_SCALE_ROW,
        end - begin, own, pair, VALUE_ROW, VALUE_SCALE_ROW, GROUPS,
    )  # fmt: skip
    other_values, other_value_scales = _values(
        value_codes + other_block * value_stride_block + other_place * VALUE_ROW,
        value_scale + other_block * value_scale_stride_block + other_place * VALUE_SCALE_ROW,
        end - begin - 16, own, pair, VALUE_ROW, VALUE_SCALE_ROW, GROUPS,
    )  # fmt: skip
    # Where the tile after next lies has to be known a tile before, not to wait for it.
    block, place = _block(table, batch, begin + _TILE, end, BLOCK_SIZE, PAGED)
    other_block, other_place = _block(table, batch, begin + _TILE + 16, end, BLOCK_SIZE, PAGED)
    selector = tl.where(own < 4, 0x5410, 0x7632)
    span = tl.maximum(end - begin, _TILE)
    if PAIRS > 0:
        span = SPAN
        program = (group * splits + split).to(tl.int64)
        turned_offsets += program * (SPAN * ROWS)
    for first in tl.range(begin, end, span, num_stages=1):
        if PAIRS > 0:
            tl.debug_barrier()
            turn_offsets(
                factors, steps, frequencies, shift, turned_offsets, first, tl.minimum(first + SPAN, end),
                batch, USED, ROWS, PAIRS, PADDED_PAIRS, SHIFTED, _TILE,
            )  # fmt: skip
            tl.debug_barrier()
        for start in tl.range(first, tl.minimum(first + span, end), _TILE, num_stages=1):
            if PAIRS > 0:
                offsets = ()
                for row in tl.static_range(4):
                    of_key = turned_offsets + (start - first + own) * ROWS + first_column + 8 * row * ROWS
                    of_first, of_second = _two_words(of_key)
                    offsets = offsets + (of_first, of_second)
            all_values = values + other_values
            all_scales = value_scales + other_value_scales
            words = keys + other_keys
            scale_words = key_scales + other_key_scales
            logits = ()
            for tile in tl.static_range(2):
                l0 = tl.zeros([32], tl.float32)
                l1 = tl.zeros([32], tl.float32)
                l2 = tl.zeros([32], tl.float32)
                l3 = tl.zeros([32], tl.float32)
                scales = ()
                other_scales = ()
                for each in tl.static_range(GROUPS):
                    low_scale, high_scale = _floats(scale_words[2 * tile * GROUPS + each])
                    scales = scales + (low_scale, high_scale)
                    low_scale, high_scale = _floats(scale_words[(2 * tile + 1) * GROUPS + each])
                    other_scales = other_scales + (low_scale, high_scale)
                for each in tl.static_range(GROUPS):
                    # Of the lower channels a and e, of the higher c and g.
                    a0, c0, a2, c2 = _key_numbers(words[2 * (2 * tile * GROUPS + each)])
                    a1, c1, a3, c3 = _key_numbers(words[2 * ((2 * tile + 1) * GROUPS + each)])
                    e0, g0, e2, g2 = _key_numbers(words[2 * (2 * tile * GROUPS + each) + 1])
                    e1, g1, e3, g3 = _key_numbers(words[2 * ((2 * tile + 1) * GROUPS + each) + 1])
                    d0, d1, d2, d3 = _mma(
                        a0, a1, a2, a3, queries[4 * each], queries[4 * each + 1],
                        bases[2 * each], bases[2 * each + 1], bases[2 * each], bases[2 * each + 1],
                    )  # fmt: skip
                    d0, d1, d2, d3 = _mma(
                        e0, e1, e2, e3, queries[4 * each + 2], queries[4 * each + 3], d0, d1, d2, d3
                    )
                    l0 += d0 * scales[each]
                    l1 += d1 * scales[each]
                    l2 += d2 * other_scales[each]
                    l3 += d3 * other_scales[each]
                    d0, d1, d2, d3 = _mma(
                        c0, c1, c2, c3, queries[4 * (GROUPS + each)], queries[4 * (GROUPS + each) + 1],
                        bases[2 * (GROUPS + each)], bases[2 * (GROUPS + each) + 1],
                        bases[2 * (GROUPS + each)], bases[2 * (GROUPS + each) + 1],
                    )  # fmt: skip
                    d0, d1, d2, d3 = _mma(
                        g0, g1, g2, g3, queries[4 * (GROUPS + each) + 2], queries[4 * (GROUPS + each) + 3],
                        d0, d1, d2, d3,
                    )  # fmt: skip
                    l0 += d0 * scales[GROUPS + each]
                    l1 += d1 * scales[GROUPS + each]
                    l2 += d2 * other_scales[GROUPS + each]
                    l3 += d3 * other_scales[GROUPS + each]
                logits = logits + (l0, l1, l2, l3)
            # The next tile, while this one is at work.
            keys, key_scales = _keys(
                key_codes + block * key_stride_block + place * KEY_ROW,
                key_scale + block * key_scale_stride_block + place * KEY_SCALE_ROW,
                own, pair, KEY_ROW, KEY_SCALE_ROW, GROUPS,
            )  # fmt: skip
            other_keys, other_key_scales = _keys(
                key_codes + other_block * key_stride_block + other_place * KEY_ROW,
                key_scale + other_block * key_scale_stride_block + other_place * KEY_SCALE_ROW,
                own, pair, KEY_ROW, KEY_SCALE_ROW, GROUPS,
            )  # fmt: skip
            coming = start + _TILE
            values, value_scales = _values(
                value_codes + block * value_stride_block + place * VALUE_ROW,
                value_scale + block * value_scale_stride_block + place * VALUE_SCALE_ROW,
                end - coming, own, pair, VALUE_ROW, VALUE_SCALE_ROW, GROUPS,
            )  # fmt: skip
            other_values, other_value_scales = _values(
                value_codes + other_block * value_stride_block + other_place * VALUE_ROW,
                value_scale + other_block * value_scale_stride_block + other_place * VALUE_SCALE_ROW,
                end - coming - 16, own, pair, VALUE_ROW, VALUE_SCALE_ROW, GROUPS,
            )  # fmt: skip
            block, place = _block(table, batch, coming + _TILE, end, BLOCK_SIZE, PAGED)
            other_block, other_place = _block(table, batch, coming + _TILE + 16, end, BLOCK_SIZE, PAGED)

            shown = ()
            for row in tl.static_range(4):
                key = start + 8 * row + own
                first_logit = logits[4 * (row // 2) + 2 * (row % 2)] * first_factor
                second_logit = logits[4 * (row // 2) + 2 * (row % 2) + 1] * second_factor
                if OFFSET:
                    if PAIRS > 0:
                        first_logit += offsets[2 * row].to(tl.float32, bitcast=True)
                        second_logit += offsets[2 * row + 1].to(tl.float32, bitcast=True)
                    first_logit += first_constant
                    second_logit += second_constant
                    if SINK:
                        first_logit += tl.where(key == zeroth, first_sink, 0.0)
                        second_logit += tl.where(key == zeroth, second_sink, 0.0)
                first_seen = (key < end) & (key <= first_last)
                second_seen = (key < end) & (key <= second_last)
                if WINDOW:
                    first_seen = first_seen & (key > first_last - window)
                    second_seen = second_seen & (key > second_last - window)
                first_logit = tl.where(first_seen, first_logit, float("-inf"))
                second_logit = tl.where(second_seen, second_logit, float("-inf"))
                shown = shown + (first_logit, second_logit)
            first_top = tl.maximum(tl.maximum(shown[0], shown[2]), tl.maximum(shown[4], shown[6]))
            second_top = tl.maximum(tl.maximum(shown[1], shown[3]), tl.maximum(shown[5], shown[7]))
            first_top = tl.maximum(first_best, _largest(first_top))
            second_top = tl.maximum(second_best, _largest(second_top))
            first_safe = tl.where(first_top == float("-inf"), 0.0, first_top)
            second_safe = tl.where(second_top == float("-inf"), 0.0, second_top)
            first_kept = tl.exp2(first_best - first_safe)
            second_kept = tl.exp2(second_best - second_safe)
            first_best = first_top
            second_best = second_top
            first_weight = first_weight * first_kept
            second_weight = second_weight * second_kept
            weights = ()
            for row in tl.static_range(4):
                first_part_of = tl.exp2(shown[2 * row] - first_safe)
                second_part_of = tl.exp2(shown[2 * row + 1] - second_safe)
                first_weight += first_part_of
                second_weight += second_part_of
                weights = weights + (_transposed(first_part_of, second_part_of),)

            s01 = _pairs_of_scales(all_scales, 0, selector, GROUPS)
            s23 = _pairs_of_scales(all_scales, 2, selector, GROUPS)
            s45 = _pairs_of_scales(all_scales, 4, selector, GROUPS)
            s67 = _pairs_of_scales(all_scales, 6, selector, GROUPS)
            new_sums = ()
            for each in tl.static_range(GROUPS):
                a = _value_numbers(all_values[each], all_values[GROUPS + each], s01[0], s01[1])
                b = _value_numbers(
                    all_values[2 * GROUPS + each], all_values[3 * GROUPS + each], s23[0], s23[1]
                )
                c = _value_numbers(
                    all_values[4 * GROUPS + each], all_values[5 * GROUPS + each], s45[0], s45[1]
                )
                d = _value_numbers(
                    all_values[6 * GROUPS + each], all_values[7 * GROUPS + each], s67[0], s67[1]
                )
                for channels in tl.static_range(4):
                    s = _mma(
                        a[2 * channels], a[2 * channels + 1], b[2 * channels], b[2 * channels + 1],
                        weights[0], weights[1],
                        sums[16 * each + 4 * channels] * first_kept,
                        sums[16 * each + 4 * channels + 1] * second_kept,
                        sums[16 * each + 4 * channels + 2] * first_kept,
                        sums[16 * each + 4 * channels + 3] * second_kept,
                    )  # fmt: skip
                    s = _mma(
                        c[2 * channels], c[2 * channels + 1], d[2 * channels], d[2 * channels + 1],
                        weights[2], weights[3], s[0], s[1], s[2], s[3],
                    )  # fmt: skip
                    new_sums = new_sums + (s[0], s[1], s[2], s[3])
            sums = new_sums

    first_weight = _total(first_weight)
    second_weight = _total(second_weight)
    if WHOLE:
        first_out = (
            output
            + (((batch * TOKENS + first_column // SHARED) * HEADS + kv_head * SHARED) + first_column % SHARED)
            * HEAD_DIM
        )
        second_out = (
            output
            + (
                ((batch * TOKENS + second_column // SHARED) * HEADS + kv_head * SHARED)
                + second_column % SHARED
            )
            * HEAD_DIM
        )
    else:
        # All lanes with the same pair have the same numbers.
        tl.store(statistics + first_part * 2, first_best, mask=first_there & (own == 0))
        tl.store(statistics + first_part * 2 + 1, first_weight, mask=first_there & (own == 0))
        tl.store(statistics + second_part * 2, second_best, mask=second_there & (own == 0))
        tl.store(statistics + second_part * 2 + 1, second_weight, mask=second_there & (own == 0))
        first_out = output + first_part * HEAD_DIM
        second_out = output + second_part * HEAD_DIM
    for each in tl.static_range(GROUPS):
        for channels in tl.static_range(4):
            for index in tl.static_range(2):
                channel = channels // 2 * HALF + 4 * (GROUPS * own + each) + (2 * (channels % 2) + index)
                first_sum = sums[4 * (4 * each + channels) + 2 * index]
                second_sum = sums[4 * (4 * each + channels) + 2 * index + 1]
                if WHOLE:
                    # As the parts are combined, so that one part is no other result than all.
                    first_sum = tl.where(
                        first_weight == 0, 0.0, first_sum / tl.where(first_weight == 0, 1.0, first_weight)
                    )
                    second_sum = tl.where(
                        second_weight == 0, 0.0, second_sum / tl.where(second_weight == 0, 1.0, second_weight)
                    )
                    if VALUE_OFFSET:
                        mean = tl.load(value_offset + kv_head * HEAD_DIM + channel)
                        first_sum += tl.where(first_weight == 0, 0.0, mean)
                        second_sum += tl.where(second_weight == 0, 0.0, mean)
                tl.store(first_out + channel, first_sum.to(output.dtype.element_ty), mask=first_there)
                tl.store(second_out + channel, second_sum.to(output.dtype.element_ty), mask=second_there)
