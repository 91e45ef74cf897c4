"""What is asked of a model, and how long it took."""

from __future__ import annotations

import random
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from rrsq.errors import UsageError

__all__ = ["Generate", "Load", "Measurement", "measure", "parse_loads", "prompts_of"]

Generate = Callable[[list[list[int]], int], object]
"""Continues all of the prompts by so many tokens, no fewer; back when the last one is there."""


@dataclass(frozen=True)
class Load:
    """Requests at once, and tokens of the prompt of each."""

    batch: int
    context: int

    def __str__(self) -> str:
        """``16x1024``."""
        return f"{self.batch}x{self.context}"


@dataclass(frozen=True)
class Measurement:
    """Milliseconds of a load: the best of the repeats, and their median.

    Attributes:
        decode: one step, the mean of many.
        prefill: all prompts and the first token of each.
    """

    batch: int
    context: int
    decode: float
    prefill: float
    decode_median: float
    prefill_median: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all requests, while decoding."""
        return 1e3 * self.batch / self.decode

    @property
    def prompt_tokens_per_second(self) -> float:
        """Tokens of the prompts, while they are read."""
        return 1e3 * self.batch * self.context / self.prefill


def parse_loads(text: str) -> tuple[Load, ...]:
    """Read ``BATCHxCONTEXT`` by commas. Raises :class:`UsageError` for anything else."""
    found = [re.fullmatch(r"([1-9]\d{0,8})[x×]([1-9]\d{0,8})", part) for part in text.split(",")]
    if not all(found):
        raise UsageError(f"--loads {text:.200}: expected BATCHxCONTEXT, for example 1x128,16x1024.")
    return tuple(dict.fromkeys(Load(int(match[1]), int(match[2])) for match in found if match))


def prompts_of(load: Load, vocabulary: int) -> list[list[int]]:
    """Random tokens, the same for every contender."""
    generator = random.Random(str(load))
    return [generator.choices(range(vocabulary), k=load.context) for _ in range(load.batch)]


def measure(generate: Generate, load: Load, vocabulary: int, new_tokens: int, repeats: int) -> Measurement:
    """Time a load.

    A step is the time of ``new_tokens`` less that of one, over the number of steps between them: what a
    request costs once (reading the prompt, tokens on their way) is taken off. Both numbers of tokens are run
    once before anything is measured, so that what an engine compiles for them is compiled.

    Args:
        generate: the engine.
        load: requests and tokens of each.
        vocabulary: tokens to draw from.
        new_tokens: at least 2.
        repeats: of each number of tokens.
    """
    prompts = prompts_of(load, vocabulary)

    def seconds(tokens: int) -> float:
        begin = time.perf_counter()
        generate(prompts, tokens)
        return time.perf_counter() - begin

    for tokens in (1, new_tokens):
        seconds(tokens)
    first, last = ([seconds(tokens) for _ in range(repeats)] for tokens in (1, new_tokens))
    steps = new_tokens - 1
    best, median = (
        (1e3 * (middle(last) - middle(first)) / steps, 1e3 * middle(first))
        for middle in (min, statistics.median)
    )
    return Measurement(load.batch, load.context, best[0], best[1], median[0], median[1])
