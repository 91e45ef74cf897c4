"""Attention by warps without a GPU: its assembly is executed lane by lane."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from rrsq.kernels import use_kernels

from .lanes import execute_assembly
from .problems import needs_triton
from .test_cache_decoding import CASES, Cache, distance

WARPS = [name for name in CASES if name.startswith("by warps")]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grids with which the kernel of warps was launched, in the interpreter."""
    if torch.cuda.is_available():
        pytest.skip("a GPU runs it as it is")
    module = sys.modules["rrsq.kernels.cache_attend"]
    kernel = module.attend_by_warps  # type: ignore[attr-defined]
    grids: list[Any] = []

    class Recorded:
        def __getitem__(self, grid: Any) -> Any:
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(module, "COMPILED", True)
    monkeypatch.setattr(module, "attend_by_warps", Recorded())
    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", execute_assembly)
    return grids


@needs_triton
@pytest.mark.parametrize("name", WARPS)
def test_it_attends_as_float64_does(name: str, launches: list[Any], device: torch.device) -> None:
    cache = Cache(CASES[name], device)
    with use_kernels("eager"):
        cache.append()
        expected = cache.expected()
    with use_kernels("triton"):
        actual = cache.attend()
    assert launches
    assert distance(actual, expected) < 2**-7


@needs_triton
def test_what_lies_behind_the_last_token_is_not_seen(launches: list[Any], device: torch.device) -> None:
    cache = Cache(CASES["by warps, pages"], device)
    with use_kernels("eager"):
        cache.append()
        expected = cache.expected()
    assert cache.table is not None
    used = cache.case.past + cache.case.tokens
    for row in cache.table.long():
        block, place = row[used // 16], used % 16
        for stored in cache.pages:
            if stored is not None:
                stored[block, :, place:] = 255 if stored.dtype == torch.uint8 else torch.nan
    with use_kernels("triton"):
        actual = cache.attend()
    assert launches
    assert distance(actual, expected) < 2**-7


@needs_triton
@pytest.mark.parametrize("part", ["key_scale", "value_scale"])
def test_not_a_number_is_not_lost(part: str, launches: list[Any], device: torch.device) -> None:
    cache = Cache(CASES["by warps"], device)
    with use_kernels("eager"):
        cache.append()
    getattr(cache.pages, part)[0, 0, 40] = torch.nan
    with use_kernels("triton"):
        actual = cache.attend()
    assert launches
    shared = cache.case.shared
    assert actual[0, :, :shared].isnan().all(-1).all() if part == "key_scale" else actual[0].isnan().any()
    assert not actual[1].isnan().any()
    assert not actual[0, :, shared:].isnan().any()
