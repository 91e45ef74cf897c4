"""Run the contenders: check each, time it, compare it with the library and with the machine's ceilings."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from rrsq.errors import RRSQError

from .ceilings import Ceilings
from .contenders import Call, Contender, contenders_for
from .linear_scheme import LinearScheme
from .problem import Problem, make_problems
from .shapes import LinearShape
from .timing import time_in_turn

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
    scheme: LinearScheme


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
            problems = make_problems(tokens, shape, settings.device, settings.scheme)
            library: float | None = None
            contenders = contenders_for(list(settings.against), shape, settings.scheme)
            for group in _groups(contenders):
                progress(f"{shape.name} {tokens} tokens: {' and '.join(c.name for c in group)}")
                for row in _measure_group(group, problems, shape, settings, ceilings, library):
                    if row.name == "cublas":
                        library = row.microseconds
                    yield row


def _groups(contenders: list[Contender]) -> list[list[Contender]]:
    """Contenders that are timed in turn: neighbours of the same ``turn``."""
    numbered = enumerate(contenders)
    keyed = itertools.groupby(numbered, key=lambda item: item[1].turn or str(item[0]))
    return [[contender for _, contender in group] for _, group in keyed]


def _measure_group(
    group: list[Contender],
    problems: list[Problem],
    shape: LinearShape,
    settings: Settings,
    ceilings: Ceilings,
    library: float | None,
) -> Iterator[Row]:
    """Check each contender, then time those that passed in turn."""
    tokens = problems[0].x.shape[0]
    checked = [_check(contender, problems, tokens, shape, settings.device) for contender in group]
    ready = [calls for calls, _ in checked if calls]
    times = iter(time_in_turn(ready, settings.device, settings.seconds, settings.cuda_graph) if ready else [])
    for contender, (calls, row) in zip(group, checked, strict=True):
        yield _timed(row, contender, next(times), problems[0], ceilings, library) if calls else row


def _check(
    contender: Contender, problems: list[Problem], tokens: int, shape: LinearShape, device: torch.device
) -> tuple[list[Call], Row]:
    """What to time, and the row without its time; nothing to time where the contender cannot run."""
    row = Row(shape.name, tokens, contender.name, None)
    reason = contender.unavailable(device)
    if reason is not None:
        return [], replace(row, reason=reason)
    ours = contender.name.startswith("rrsq") or contender.stage
    try:
        calls = [contender.prepare(problem) for problem in problems]
        actual = calls[0]()
    except (RuntimeError, TypeError, ImportError, AttributeError, AssertionError) as error:
        if ours:
            raise
        return [], replace(row, reason=f"{type(error).__name__}: {error}".splitlines()[0][:120])
    error_size = _relative_error(actual, contender.expected(problems[0]))
    if not error_size <= contender.tolerance:
        wrong = f"off by {error_size:.2e} (allowed: {contender.tolerance:.0e})"
        if ours:
            raise IncorrectResultError(
                f"{contender.name} on {shape} with {tokens} tokens is {wrong}. Its time means nothing; "
                "please report this."
            )
        return [], replace(row, reason=wrong, error=error_size)
    return calls, replace(row, error=error_size)


def _timed(
    row: Row,
    contender: Contender,
    microseconds: float,
    problem: Problem,
    ceilings: Ceilings,
    library: float | None,
) -> Row:
    seconds = microseconds / 1e6
    tokens, shape = problem.x.shape[0], problem.shape
    operations = 0.0 if contender.stage else 2.0 * tokens * shape.in_features * shape.out_features
    size = _bytes(contender, problem)
    rate = ceilings.bf16_operations_per_second * (1 if contender.name == "cublas" else 2)
    floor = max(operations / rate, size / ceilings.bytes_per_second)
    return replace(
        row,
        microseconds=microseconds,
        ratio=None if contender.stage else (library or microseconds) / microseconds,
        teraflops=operations / seconds / 1e12 or None,
        gigabytes_per_second=size / seconds / 1e9,
        ceiling_share=floor / seconds,
    )


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    return float(difference) if bool(torch.isfinite(actual).all()) else float("inf")


def _bytes(contender: Contender, problem: Problem) -> float:
    """The fewest bytes the call must move: every operand read once, the result written once."""
    tokens, shape = problem.x.shape[0], problem.shape
    if contender.stage:
        return 3.0 * tokens * shape.in_features
    activation = 2 if contender.name in ("cublas", "rrsq-linear") else 1
    bits = problem.scheme.weight_bits if contender.weight_bits is None else contender.weight_bits
    weight = shape.out_features * shape.in_features * bits / 8
    return tokens * shape.in_features * activation + weight + 2.0 * tokens * shape.out_features
