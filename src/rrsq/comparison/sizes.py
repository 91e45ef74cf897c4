"""How large and how fast the models of a comparison are: what was measured of it."""

from __future__ import annotations

import statistics

from rrsq.comparison.steps import Comparison
from rrsq.comparison.subjects import Subject

__all__ = ["speed_of", "stored_bits", "stored_bytes"]

_BYTES = {"float32": 4, "float64": 8}


def stored_bytes(comparison: Comparison, subject: Subject) -> int | None:
    """Bytes of all weights as they are stored; None where no quantization has told."""
    reports = [report for report in comparison.quantizations.values() if report]
    if subject.recipe is None:
        return int(reports[0]["bytes_before"]) if reports else None
    report = comparison.quantizations[subject.recipe]
    return int(report["bytes_after"]) if report else None


def stored_bits(comparison: Comparison, subject: Subject) -> float | None:
    """The same in bits, over the number of the original model's weights, tied ones counted once."""
    size = stored_bytes(comparison, subject)
    if size is None:
        return None
    before = next(int(report["bytes_before"]) for report in comparison.quantizations.values() if report)
    return 8 * size / (before / _BYTES.get(comparison.source_dtype, 2))


def speed_of(comparison: Comparison, subject: Subject) -> float | None:
    """Tokens a second over the windows of a perplexity, the median of those measured; None without one."""
    model = next(model for model in comparison.report.models if model.model == subject.name)
    speeds = [float(speed) for result in model.results if (speed := result.details.get("tokens_per_second"))]
    return statistics.median(speeds) if speeds else None
