"""What an evaluation found, as plain data that becomes JSON."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrsq import __version__
from rrsq.errors import StorageError
from rrsq.evaluation.results import Metric, TaskResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "ACCURACIES",
    "AVERAGE",
    "Difference",
    "EvaluationReport",
    "ModelReport",
    "jsonable",
    "library_versions",
    "quantization_method",
    "recovery_text",
    "value_text",
    "write_json",
    "write_text",
]

LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "lm_eval", "vllm")
ACCURACIES = ("acc", "acc_norm")
AVERAGE = "average"


@dataclass(frozen=True)
class ModelReport:
    """One model and what each task gave."""

    model: str
    """The path or Hub id it was loaded from."""
    device: str
    dtype: str
    quantization: str | None
    """Its ``quant_method``, or None for a model that is not quantized."""
    results: tuple[TaskResult, ...]

    @classmethod
    def of(cls, path: str, model: PreTrainedModel, results: tuple[TaskResult, ...]) -> ModelReport:
        """Describe a loaded model."""
        return cls(
            model=path,
            device=_device_name(model),
            dtype=str(model.dtype).removeprefix("torch."),
            quantization=quantization_method(model.config),
            results=results,
        )

    def result(self, task: str) -> TaskResult | None:
        """The result of a task, or None."""
        return next((result for result in self.results if result.task == task), None)


@dataclass(frozen=True)
class Difference:
    """A number of one model beside the reference's."""

    model: str
    metric: Metric
    difference: float | None
    """The model's value less the reference's."""
    recovery: float | None
    """The model's value over the reference's."""


@dataclass(frozen=True)
class EvaluationReport:
    """One model or several, the first being the reference, and the versions of what computed them."""

    models: tuple[ModelReport, ...]
    versions: Mapping[str, str] = field(default_factory=lambda: library_versions())

    @classmethod
    def of(cls, models: Sequence[ModelReport]) -> EvaluationReport:
        """Put models together, each with its average over the tasks that have an accuracy."""
        return cls(tuple(replace(model, results=_with_average(model.results)) for model in models))

    @property
    def reference(self) -> ModelReport | None:
        """What the others are compared with; None for a single model."""
        return self.models[0] if len(self.models) > 1 else None

    def tasks(self) -> list[str]:
        """Names of all tasks that any model was measured on, in order; the average comes last."""
        names = dict.fromkeys(result.task for model in self.models for result in model.results)
        return sorted(names, key=lambda name: name == AVERAGE)

    def compare(self, model: ModelReport, task: str) -> list[Difference]:
        """Each metric of a task on one model, beside the reference's; without one, there is no difference."""
        result = model.result(task)
        if result is None:
            return []
        reference = None if self.reference is None else self.reference.result(task)
        return [_difference(model.model, metric, reference) for metric in result.metrics]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able data. Numbers that JSON has no word for become "Infinity" and "NaN"."""
        document: dict[str, Any] = {
            "models": [_model_dict(model) for model in self.models],
            "versions": dict(self.versions),
        }
        if self.reference is not None:
            document["reference"] = self.reference.model
            document["comparison"] = [
                {
                    "task": task,
                    "metric": one.metric.name,
                    "model": one.model,
                    "difference": one.difference,
                    "recovery": one.recovery,
                }
                for task in self.tasks()
                for model in self.models[1:]
                for one in self.compare(model, task)
            ]
        plain: dict[str, Any] = jsonable(document)
        return plain


def _with_average(results: tuple[TaskResult, ...]) -> tuple[TaskResult, ...]:
    """Add the mean of the headline accuracies, as tables of zero-shot tasks have it, if there are several.

    Every task counts the same, whatever its number of questions.
    """
    counted = [result for result in results if result.headline.name in ACCURACIES]
    if len(counted) < 2:
        return results
    average = sum(result.headline.value for result in counted) / len(counted)
    names = ", ".join(f"{result.task} ({result.headline.name})" for result in counted)
    fingerprints = "".join(result.data_fingerprint for result in counted)
    return (
        *results,
        TaskResult(
            task=AVERAGE,
            metrics=(Metric("accuracy", average, higher_is_better=True),),
            convention=f"The mean of {names}; each counts the same.",
            seconds=0.0,
            data_fingerprint=hashlib.sha256(fingerprints.encode()).hexdigest(),
        ),
    )


def _difference(model: str, metric: Metric, reference: TaskResult | None) -> Difference:
    other = None if reference is None else reference.metric(metric.name)
    if other is None:
        return Difference(model, metric, None, None)
    return Difference(model, metric, metric.value - other.value, metric.recovery(other.value))


def value_text(metric: Metric) -> str:
    """A value with its standard error: ``0.5423 ±0.0102``."""
    return f"{metric.value:.4f}" + ("" if metric.stderr is None else f" ±{metric.stderr:.4f}")


def recovery_text(one: Difference) -> str:
    """What is left of an accuracy, ``97.2 %``, or by how much a perplexity grew, ``×1.383``; else nothing."""
    if one.recovery is None:
        return ""
    return f"{100 * one.recovery:.1f} %" if one.metric.higher_is_better else f"×{one.recovery:.3f}"


def library_versions() -> dict[str, str]:
    """Return the versions of rrsq, Python and the libraries a result depends on."""
    versions = {"rrsq": __version__, "python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            versions[library] = "not installed"
    return versions


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write JSON as :func:`write_text` does."""
    write_text(path, json.dumps(document, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text beside ``path`` and rename it into place, so that no half-written file is ever there.

    Raises :class:`StorageError` if the folder cannot be written; a full disk passes as :class:`OSError`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise StorageError(f"'{path}' cannot be written: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _model_dict(report: ModelReport) -> dict[str, Any]:
    return {
        "path": report.model,
        "device": report.device,
        "dtype": report.dtype,
        "quantization": report.quantization,
        "results": [result.to_dict() for result in report.results],
    }


def quantization_method(config: Any) -> str | None:
    """The ``quant_method`` of a transformers configuration, or None."""
    quantization = getattr(config, "quantization_config", None)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    method = getattr(method, "quant_method", method)
    return None if method is None else str(getattr(method, "value", method))


def _device_name(model: PreTrainedModel) -> str:
    if model.device.type != "cuda":
        return str(model.device)
    import torch

    return f"{model.device} ({torch.cuda.get_device_name(model.device)})"


def jsonable(value: Any) -> Any:
    """Plain data in which numbers that JSON has no word for are "Infinity", "-Infinity" and "NaN"."""
    if isinstance(value, Mapping):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
