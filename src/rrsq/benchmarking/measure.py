"""Run the contenders: check each, time it, compare it with the library and with the machine's ceilings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from rrsq.errors import RRSQError

from .ceilings import Ceilings
from .contenders import Contender, contenders_for
from .problem import Problem, make_problems
from .shapes import LinearShape
from .timing import time_calls

__all__ = ["IncorrectResultError", "Row", "Settings", "measure"]


class IncorrectResultError(RRSQError):
    """A kernel gave a wrong result, so its time means nothing."""


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    shapes: tuple[LinearShape, ...]
    tokens: tuple[int, ...]
    against: tuple[str, ...]
    device: torch.device
    cuda_graph: bool
    seconds: float
    """About how long to measure each row."""


@dataclass(frozen=True)
class Row:
    """One measurement; ``microseconds`` is None where the contender could not run, for the ``reason``."""

    shape: str
    tokens: int
    name: str
    microseconds: float | None
    reason: str | None = None
    error: float | None = None
    """Relative error against float64 (Frobenius norms)."""
    ratio: float | None = None
    """Times faster than the library's bfloat16 product in the same run."""
    teraflops: float | None = None
    gigabytes_per_second: float | None = None
    ceiling_share: float | None = None
    """Share of what bandwidth or arithmetic, whichever binds, would allow."""


def measure(settings: Settings, ceilings: Ceilings, progress: Callable[[str], None]) -> Iterator[Row]:
    """Yield a row for each shape, number of tokens and contender.

    Raises:
        IncorrectResultError: one of our results is wrong. A baseline's is said in its row, and not timed.
    """
    for shape in settings.shapes:
        for tokens in settings.tokens:
            problems = make_problems(tokens, shape, settings.device)
            library: float | None = None
            for contender in contenders_for(list(settings.against), shape):
                progress(f"{shape.name} {tokens} tokens: {contender.name}")
                row = _measure_one(contender, problems, tokens, shape, settings, ceilings, library)
                if contender.name == "cublas":
                    library = row.microseconds
                yield row


def _measure_one(
    contender: Contender,
    problems: list[Problem],
    tokens: int,
    shape: LinearShape,
    settings: Settings,
    ceilings: Ceilings,
    library: float | None,
) -> Row:
    reason = contender.unavailable(settings.device)
    if reason is not None:
        return Row(shape.name, tokens, contender.name, None, reason)
    calls = []
    try:
        calls = [contender.prepare(problem) for problem in problems]
        actual = calls[0]()
    except (RuntimeError, TypeError, ImportError, AttributeError, AssertionError) as error:
        if contender.name.startswith("rrsq"):
            raise
        return Row(shape.name, tokens, contender.name, None, str(error).splitlines()[0][:120])
    error_size = _relative_error(actual, contender.expected(problems[0]))
    if not error_size <= contender.tolerance:
        wrong = f"off by {error_size:.2e} (allowed: {contender.tolerance:.0e})"
        if contender.name.startswith("rrsq") or contender.stage:
            raise IncorrectResultError(
                f"{contender.name} on {shape} with {tokens} tokens is {wrong}. Its time means nothing; "
                "please report this."
            )
        return Row(shape.name, tokens, contender.name, None, wrong, error_size)
    del actual
    microseconds = time_calls(calls, settings.device, settings.seconds, settings.cuda_graph)
    seconds = microseconds / 1e6
    operations = 0.0 if contender.stage else 2.0 * tokens * shape.in_features * shape.out_features
    size = _bytes(contender, tokens, shape)
    rate = ceilings.bf16_operations_per_second * (1 if contender.name == "cublas" else 2)
    floor = max(operations / rate, size / ceilings.bytes_per_second)
    return Row(
        shape.name,
        tokens,
        contender.name,
        microseconds,
        error=error_size,
        ratio=None if contender.stage else (library or microseconds) / microseconds,
        teraflops=operations / seconds / 1e12 or None,
        gigabytes_per_second=size / seconds / 1e9,
        ceiling_share=floor / seconds,
    )


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    return float(difference) if bool(torch.isfinite(actual).all()) else float("inf")


def _bytes(contender: Contender, tokens: int, shape: LinearShape) -> float:
    """The fewest bytes the call must move: every operand read once, the result written once."""
    if contender.stage:
        return 3.0 * tokens * shape.in_features
    activation = 2 if contender.name in ("cublas", "rrsq-linear") else 1
    weight = shape.out_features * shape.in_features * contender.weight_bits / 8
    return tokens * shape.in_features * activation + weight + 2.0 * tokens * shape.out_features
