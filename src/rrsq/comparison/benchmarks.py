"""Speeds and memory that ``rrsq bench --whole`` measured on the checkpoints of a comparison."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from rrsq.benchmarking.whole.contenders import BASE, OURS
from rrsq.comparison.folder import FULL_PRECISION
from rrsq.errors import UsageError

__all__ = ["Benchmark", "read_benchmarks"]


@dataclass(frozen=True)
class Benchmark:
    """One model of one file.

    Attributes:
        subject: a recipe, or the full-precision model.
        engine, device: where it ran.
        peak_bytes: of the device's memory; None where it says nothing.
        tokens_per_second: new tokens of all requests, by the load.
    """

    subject: str
    engine: str
    device: str
    peak_bytes: int | None
    tokens_per_second: dict[str, float]


def read_benchmarks(paths: Sequence[Path], recipes: Collection[str]) -> list[Benchmark]:
    """Read files of ``rrsq bench --whole --model CHECKPOINT --json FILE``.

    Of several with a run in bfloat16, the first one's counts for the full-precision model.

    Raises:
        UsageError: one is no such file, or of another recipe.
    """
    found: dict[str, Benchmark] = {}
    for path in paths:
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            recipe, engine = str(document["recipe"]), str(document["engine"])
            outcomes = {outcome["name"]: outcome for outcome in document["outcomes"]}
            own, base = outcomes[OURS], outcomes.get(BASE)
            entries = [(recipe, own), (FULL_PRECISION, base)]
            made = [_benchmark(name, engine, outcome) for name, outcome in entries if outcome is not None]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"--bench {path}: this is no file of 'rrsq bench --whole --model CHECKPOINT --json FILE'."
            ) from error
        if recipe not in recipes:
            raise UsageError(
                f"--bench {path}: it is of recipe '{recipe}', which is not compared here"
                f" ({', '.join(recipes)} are)."
            )
        for one in made:
            found.setdefault(one.subject, one)
    return list(found.values())


def _benchmark(subject: str, engine: str, outcome: dict[str, object]) -> Benchmark:
    measurements = outcome["measurements"]
    peak = outcome["peak_bytes"]
    assert isinstance(measurements, list)
    speeds = {f"{one['batch']}x{one['context']}": float(one["tokens_per_second"]) for one in measurements}
    return Benchmark(
        subject, engine, str(outcome["device"]), None if peak is None else int(str(peak)), speeds
    )
