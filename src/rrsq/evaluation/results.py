"""What a task measured on one model, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Metric", "TaskResult"]


@dataclass(frozen=True)
class Metric:
    """One number."""

    name: str
    """The field's name for it: ``perplexity``, ``acc``, ``acc_norm``."""
    value: float
    higher_is_better: bool
    stderr: float | None = None
    """Standard error over the questions; None where it is not known."""
    relative: bool = False
    """There is no ratio to the reference's to take: it compares by itself, as a divergence does, or is a
    logarithm."""

    def recovery(self, reference: float) -> float | None:
        """This value over the reference model's: 1 is nothing lost.

        Below 1 is a loss where higher is better, above 1 where lower is. None if there is nothing to divide.
        """
        return None if self.relative or not reference else self.value / reference


@dataclass(frozen=True)
class TaskResult:
    """One task on one model."""

    task: str
    metrics: tuple[Metric, ...]
    """At least one; the first is the headline."""
    convention: str
    """One sentence that says how the numbers are computed."""
    seconds: float
    data_fingerprint: str
    """Equal for two models only if they were given the same token ids or questions."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Further numbers, JSON-able."""

    @property
    def headline(self) -> Metric:
        """The number to quote if only one is."""
        return self.metrics[0]

    def metric(self, name: str) -> Metric | None:
        """The metric of that name, or None."""
        return next((metric for metric in self.metrics if metric.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; numbers may be infinite or NaN."""
        return {
            "task": self.task,
            "metrics": [
                {
                    "name": metric.name,
                    "value": metric.value,
                    "stderr": metric.stderr,
                    "higher_is_better": metric.higher_is_better,
                    "relative": metric.relative,
                }
                for metric in self.metrics
            ],
            "convention": self.convention,
            "data_fingerprint": self.data_fingerprint,
            "details": dict(self.details),
            "seconds": self.seconds,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TaskResult:
        """Read what :meth:`to_dict` gave; numbers may be the words "Infinity" and "NaN"."""
        metrics = [{**metric, "value": float(metric["value"])} for metric in data["metrics"]]
        return cls(**{**data, "metrics": tuple(Metric(**metric) for metric in metrics)})
