"""A quantized cache appended to, attended to and read: references against float64, kernels against those."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rrsq import kernels
from rrsq.kernels import CachePages, use_kernels
from rrsq.kernels.cache import offset_keys
from rrsq.runtime.rotation.hadamard import orthonormal, plan_hadamard

from .problems import needs_triton


@dataclass
class Case:
    """Sizes and options of a cache, and of an attention that reads it."""

    batch: int = 2
    kv_heads: int = 2
    shared: int = 2
    head_dim: int = 64
    tokens: int = 1
    past: int = 70
    capacity: int = 100
    key_bits: int = 4
    value_bits: int = 4
    group: int = 32
    minimum: bool = True
    signed: bool = False
    rotated: bool = True
    offset: bool = True
    sink: bool = True
    balance: bool = True
    pairs: int | None = None
    window: int = 0
    softcap: float = 0.0
    padded: bool = False
    shift: tuple[int, int] | None = None
    block: int | None = None
    dtype: torch.dtype = torch.bfloat16
    huge: bool = False


CASES = {
    "default": Case(),
    "one group": Case(group=64, rotated=False),
    "head of 128": Case(head_dim=128, shared=4, kv_heads=1),
    "head of 80": Case(head_dim=80, group=16, shared=1, pairs=16),
    "head of 96": Case(head_dim=96, group=32, shared=3, pairs=0),
    "head of 256": Case(head_dim=256, batch=1, kv_heads=1, past=20, capacity=32),
    "8-bit keys": Case(key_bits=8, value_bits=8),
    "symmetric, no offset": Case(minimum=False, offset=False, sink=False),
    "no sink, no balance": Case(sink=False, balance=False),
    "balance, no rotation": Case(rotated=False),
    "signed": Case(minimum=False, signed=True),
    "partial rotation": Case(pairs=8),
    "no rotary": Case(pairs=0),
    "window": Case(window=10, past=65),
    "softcap": Case(softcap=5.0),
    "padded": Case(padded=True, shift=(0, -9)),
    "far positions": Case(shift=(900, 33)),
    "a few tokens": Case(tokens=5),
    "a few tokens, window": Case(tokens=3, window=7, padded=True),
    "first token": Case(past=0, capacity=64),
    "pages": Case(block=16, capacity=96),
    "float16": Case(dtype=torch.float16),
    "float32": Case(dtype=torch.float32),
    "one huge key": Case(huge=True),
    "full": Case(past=99),
    # What a GPU reads by warps: signed codes without minima, in groups of 32, heads of 64 or 128.
    "by warps": Case(minimum=False, signed=True, capacity=112),
    "by warps, head of 128": Case(
        minimum=False, signed=True, head_dim=128, shared=4, kv_heads=1, past=600, capacity=640
    ),
    "by warps, pages": Case(minimum=False, signed=True, shared=4, past=330, block=16, capacity=352),
    "by warps, one head a key": Case(minimum=False, signed=True, shared=1, past=290, capacity=304),
    "by warps, eight": Case(
        minimum=False,
        signed=True,
        head_dim=128,
        shared=8,
        kv_heads=1,
        batch=3,
        past=47,
        block=48,
        capacity=96,
    ),
    "by warps, a few tokens": Case(minimum=False, signed=True, shared=2, tokens=3, past=100, capacity=112),
    "by warps, window": Case(
        minimum=False, signed=True, tokens=2, shared=3, window=40, past=300, block=32, capacity=320
    ),
    "by warps, far positions": Case(
        minimum=False, signed=True, shift=(900, 33), past=270, capacity=272, head_dim=128
    ),
    "by warps, no offset": Case(minimum=False, signed=True, offset=False, sink=False, capacity=112),
    "by warps, no rotary": Case(minimum=False, signed=True, pairs=0, capacity=112),
    "by warps, first token": Case(minimum=False, signed=True, past=0, capacity=64),
    "by warps, one huge key": Case(minimum=False, signed=True, huge=True, capacity=112, head_dim=128),
}


class Cache:
    """Random tokens, the storage for them, and what attention over it must give."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(5)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        total = case.past + case.tokens
        shape = (case.batch, total, case.kv_heads, case.head_dim)
        self.keys, self.values = normal(*shape), normal(*shape)
        self.query = normal(case.batch, case.tokens, case.kv_heads * case.shared, case.head_dim)
        if case.huge:
            self.keys[:, total // 2] *= 200
        pairs = case.head_dim // 2 if case.pairs is None else case.pairs
        self.offset = 3 * normal(case.kv_heads, case.head_dim) if case.offset else None
        self.value_offset = normal(case.kv_heads, case.head_dim) if case.offset else None
        self.frequencies = 1e4 ** (-torch.arange(pairs).double() / max(pairs, 1)) if pairs else None
        self.signs = None
        if case.rotated:
            matrix = orthonormal(plan_hadamard(case.head_dim), torch.float32)
            self.signs = (matrix * case.head_dim**0.5).round().to(torch.int8)
        self.sink = 9 * normal(case.kv_heads, case.head_dim) if case.sink else None
        powers = torch.arange(case.head_dim) * 7 % 5 - 2
        self.balance = (2.0**powers).expand(case.kv_heads, -1).contiguous() if case.balance else None
        self.shift = None if case.shift is None else torch.tensor(case.shift, dtype=torch.int32)[: case.batch]
        if self.offset is not None:
            positions = torch.arange(total).expand(case.batch, -1)
            positions = positions if self.shift is None else positions + self.shift.unsqueeze(1)
            turned = offset_keys(self.offset, self.sink, positions, self.frequencies, 1.0)
            self.keys = self.keys + turned.transpose(1, 2)
        self.mask = None
        if case.padded:
            self.mask = torch.arange(case.capacity) >= torch.tensor([[0], [9]])[: case.batch]
            self.mask = self.mask[:, None, None, :]
        self.table = None
        blocks, rows = case.batch, case.capacity
        if case.block is not None:
            rows = case.block
            each = case.capacity // rows
            blocks = case.batch * each + 1
            self.table = (torch.randperm(blocks - 1, generator=generator) + 1).view(case.batch, each).int()
        self.pages = CachePages(
            *self._page(blocks, rows, case.key_bits), *self._page(blocks, rows, case.value_bits)
        )
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                kept = (
                    value.dtype
                    if name in ("offset", "sink", "balance", "value_offset") or not value.is_floating_point()
                    else None
                )
                double = value.dtype == torch.float64
                setattr(self, name, value.to(device, value.dtype if kept or double else case.dtype))
        self.pages = CachePages(*(x if x is None else x.to(device) for x in self.pages))

    def _page(self, blocks: int, rows: int, bits: int) -> tuple[Tensor, Tensor, Tensor | None]:
        case = self.case
        shape = (blocks, case.kv_heads, rows)
        groups = case.head_dim // case.group
        codes = torch.zeros(*shape, case.head_dim * bits // 8, dtype=torch.uint8)
        scale = torch.zeros(*shape, groups, dtype=torch.float16)
        return codes, scale, torch.zeros_like(scale) if case.minimum else None

    def append(self, first: int = 0, last: int | None = None) -> None:
        """Store the tokens ``first`` to ``last``."""
        last = self.case.past + self.case.tokens if last is None else last
        slots = torch.tensor([first], dtype=torch.int32, device=self.keys.device)
        positions = self.shift
        if self.table is not None:
            token = torch.arange(first, last, device=self.keys.device)
            rows = self.pages.block_size
            slots = self.table[:, token // rows].long() * rows + token % rows
            slots, positions = slots.flatten(), token.repeat(self.case.batch)
        kernels.cache_append(
            self.keys[:, first:last].transpose(1, 2),
            self.values[:, first:last].transpose(1, 2),
            *self.pages,
            slots,
            positions,
            self.signs,
            None,
            self.offset,
            self.sink,
            self.balance,
            self.value_offset,
            self.frequencies,
            1.0,
            self.case.signed,
            self.case.signed,
        )

    def attend(self) -> Tensor:
        """What the new tokens get."""
        result = torch.full_like(self.query, 7)
        kernels.cache_attend(
            self.query,
            *self.pages,
            torch.tensor([self.case.past], dtype=torch.int32, device=self.query.device),
            self.case.tokens,
            self.table,
            self.mask,
            self.signs,
            self.offset,
            self.sink,
            self.balance,
            self.value_offset,
            self.frequencies,
            1.0,
            self.shift,
            self.case.head_dim**-0.5,
            self.case.softcap,
            self.case.window,
            result,
        )
        return result

    def read(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """All keys and values."""
        return kernels.cache_read(
            self.query.to(dtype),
            *self.pages,
            0,
            self.case.past + self.case.tokens,
            self.table,
            self.shift,
            self.signs,
            None,
            self.offset,
            self.sink,
            self.balance,
            self.value_offset,
            self.frequencies,
            1.0,
        )

    def gather(self, dtype: torch.dtype, table: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of ``chosen`` tokens, of one sequence after the other."""
        rows = self.pages.block_size
        slots = table[:, chosen // rows].long() * rows + chosen % rows
        return kernels.cache_gather(
            self.query.to(dtype),
            *self.pages,
            slots.flatten(),
            chosen.repeat(self.case.batch),
            self.signs,
            None,
            self.offset,
            self.sink,
            self.balance,
            self.value_offset,
            self.frequencies,
            1.0,
        )

    def expected(self) -> Tensor:
        """Attention in float64 over what is stored, a query and a head at a time."""
        case = self.case
        keys, values = (x.double().cpu() for x in self.read(torch.float32))
        query = self.query.double().cpu()
        result = torch.zeros_like(query)
        for b in range(case.batch):
            for t in range(case.tokens):
                now = case.past + t
                seen = [
                    n
                    for n in range(now + 1)
                    if (not case.window or n > now - case.window)
                    and (self.mask is None or bool(self.mask[b, 0, 0, n]))
                ]
                for h in range(case.kv_heads * case.shared):
                    head = h // case.shared
                    logits = keys[b, head, seen] @ query[b, t, h] * case.head_dim**-0.5
                    if case.softcap:
                        logits = case.softcap * torch.tanh(logits / case.softcap)
                    if seen:
                        result[b, t, h] = torch.softmax(logits, 0) @ values[b, head, seen]
        return result


@pytest.fixture(params=CASES, ids=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def distance(actual: Tensor, expected: Tensor) -> float:
    """Largest error over the largest magnitude."""
    error = (actual.double().cpu() - expected.double().cpu()).abs().max()
    return float(error / expected.double().abs().max().clamp_min(1e-9))


def test_reference_attends_as_float64_does(case: Case) -> None:
    cache = Cache(replace(case, dtype=torch.float32), torch.device("cpu"))
    cache.append()
    assert distance(cache.attend(), cache.expected()) < 1e-5


def test_what_is_read_is_what_was_appended(case: Case) -> None:
    cache = Cache(replace(case, dtype=torch.float32, key_bits=8, value_bits=8), torch.device("cpu"))
    cache.append()
    keys, values = cache.read(torch.float32)
    balance = 1.0 if cache.balance is None else cache.balance[:, None, :]
    for read, given, factor in ((keys, cache.keys, balance), (values, cache.values, 1.0)):
        given = given.transpose(1, 2) * factor
        error = (read * factor - given).abs().amax((0, 1, 3))
        assert (error <= 0.06 * given.abs().amax((0, 1, 3)).clamp_min(1.0)).all()


@needs_triton
def test_kernel_appends_as_the_reference_does(case: Case, device: torch.device) -> None:
    case = replace(case, past=min(case.past, 18))  # More than a tile of it, and the interpreter is slow.
    stored: dict[str, CachePages] = {}
    for backend in ("eager", "triton"):
        cache = Cache(case, device)
        with use_kernels(backend):
            cache.append(0, case.past)
            cache.append(case.past)
        stored[backend] = cache.pages
    for name, ours, theirs in zip(CachePages._fields, stored["triton"], stored["eager"], strict=True):
        if ours is None or theirs is None:
            assert ours is theirs
        elif ours.dtype == torch.uint8:
            # A value next to a rounding boundary may fall to its other side.
            assert (ours != theirs).float().mean() < 0.01, name
        else:
            torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-3 if case.huge else 2e-4)


@needs_triton
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_window_in_rows_that_are_used_again(backend: str, device: torch.device) -> None:
    case = Case(window=10, past=65, tokens=3, shift=(900, 33))
    total = case.past + case.tokens
    whole, rolling = Cache(case, device), Cache(case, device)
    pages = CachePages(*rolling._page(2, 24, 4), *rolling._page(2, 24, 4))
    rolling.pages = CachePages(*(x if x is None else x.to(device) for x in pages))
    with use_kernels("eager"):
        whole.append()
        expected = whole.expected()
    with use_kernels(backend):
        for first in range(0, total, 20):
            rolling.append(first, min(first + 20, total))
        rolling.table = torch.tensor([[0], [1]], dtype=torch.int32, device=device).repeat(1, 3)
        assert distance(rolling.attend(), expected) < 2**-7


@needs_triton
def test_kernel_attends_as_float64_does(case: Case, device: torch.device) -> None:
    cache = Cache(case, device)
    with use_kernels("eager"):
        cache.append()
        expected = cache.expected()
    with use_kernels("triton"):
        actual = cache.attend()
    assert actual.dtype == case.dtype
    # The interpreter cuts off what does not fit into bfloat16.
    assert distance(actual, expected) < (2e-3 if case.dtype != torch.bfloat16 else 2**-7)


@needs_triton
def test_kernel_reads_as_the_reference_does(case: Case, device: torch.device) -> None:
    case = replace(case, past=min(case.past, 40))
    cache = Cache(case, device)
    with use_kernels("eager"):
        cache.append()
        expected = cache.read(torch.float32)
    with use_kernels("triton"):
        actual = cache.read(torch.float32)
    for ours, theirs in zip(actual, expected, strict=True):
        # The product of code and scale is rounded to float16, then divided by the balance.
        assert distance(ours, theirs) < (2e-3 if cache.balance is None else 4e-3)


@needs_triton
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_listed_tokens_are_those_that_are_read(case: Case, backend: str, device: torch.device) -> None:
    case = replace(case, past=min(case.past, 40), shift=None)
    cache = Cache(case, device)
    table = cache.table
    if table is None:
        table = torch.arange(case.batch, device=device).unsqueeze(1)
    chosen = torch.randperm(case.past + case.tokens, generator=torch.Generator().manual_seed(1)).to(device)
    with use_kernels(backend):
        cache.append()
        expected = cache.read(torch.float32)
        listed = cache.gather(torch.float32, table, chosen)
    for ours, theirs in zip(listed, expected, strict=True):
        assert torch.equal(ours, theirs[:, :, chosen].transpose(1, 2).flatten(0, 1))


def parts_of(pages: CachePages) -> CachePages:
    """The same storage as parts of one tensor, as an engine's pages have it: strides are of the whole."""
    blocks, heads = pages.key_codes.shape[:2]
    tensors = [x for x in pages if x is not None]
    sizes = [x[0, 0].numel() * x.itemsize for x in tensors]
    whole = torch.zeros(blocks, heads, sum(sizes), dtype=torch.uint8, device=pages.key_codes.device)
    views = iter(
        part.view(x.dtype).unflatten(-1, x.shape[2:])
        for part, x in zip(whole.split(sizes, -1), tensors, strict=True)
    )
    return CachePages(*(None if x is None else next(views) for x in pages))


@needs_triton
@pytest.mark.parametrize("name", ["pages", "8-bit keys", "symmetric, no offset", "head of 80"])
def test_pages_that_are_parts_of_a_tensor(name: str, device: torch.device) -> None:
    case = replace(CASES[name], past=17, capacity=32, block=16, tokens=2, window=12)
    results = []
    for parted in (False, True):
        cache = Cache(case, device)
        if parted:
            cache.pages = parts_of(cache.pages)
            assert not cache.pages.key_codes.is_contiguous()
        with use_kernels("triton"):
            cache.append()
            results.append((cache.attend(), *cache.read(torch.float32)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@needs_triton
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_not_a_number_is_not_lost(backend: str, device: torch.device) -> None:
    cache = Cache(CASES["default"], device)
    cache.keys[1, 3, 0, 5] = math.nan
    with use_kernels(backend):
        cache.append()
        out = cache.attend()
    assert out[1, :, :2].isnan().all()
    assert out[0].isfinite().all()
    assert out[1, :, 2:].isfinite().all()


@needs_triton
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_token_that_sees_nothing_gets_zero(backend: str, device: torch.device) -> None:
    cache = Cache(replace(CASES["padded"], shift=None), device)
    assert cache.mask is not None
    cache.mask[0] = False
    with use_kernels(backend):
        cache.append()
        out = cache.attend()
    assert (out[0] == 0).all()
    assert (out[1] != 0).any()


@needs_triton
def test_a_negative_slot_is_written_nowhere(device: torch.device) -> None:
    for backend in ("eager", "triton"):
        cache = Cache(CASES["pages"], device)
        keys = cache.keys[:, :1].transpose(1, 2)
        slots = torch.tensor([-1, 40], device=device)
        arguments: list[Any] = [cache.signs, None, cache.offset, cache.sink, cache.balance]
        arguments += [cache.value_offset, cache.frequencies, 1.0]
        with use_kernels(backend):
            kernels.cache_append(keys, keys, *cache.pages, slots, torch.zeros_like(slots), *arguments)
        written = cache.pages.key_scale.abs().sum((1, 3)).nonzero().tolist()
        assert written == [[40 // 16, 40 % 16]]


def test_operations_trace(device: torch.device) -> None:
    cache = Cache(CASES["default"], device)
    cache.append()
    compiled = torch.compile(cache.attend, fullgraph=True, backend="eager")
    assert torch.equal(compiled(), cache.attend())
