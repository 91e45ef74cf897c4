"""What an evaluation found, as plain data that becomes JSON."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrsq import __version__
from rrsq.errors import StorageError
from rrsq.evaluation.tasks import TaskResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["EvaluationReport", "ModelReport", "library_versions", "write_json"]

LIBRARIES = ("torch", "transformers", "tokenizers", "datasets")


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
        quantization = getattr(model.config, "quantization_config", None)
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        method = getattr(method, "quant_method", method)
        return cls(
            model=path,
            device=_device_name(model),
            dtype=str(model.dtype).removeprefix("torch."),
            quantization=None if method is None else str(getattr(method, "value", method)),
            results=results,
        )


@dataclass(frozen=True)
class EvaluationReport:
    """A model, perhaps a baseline beside it, and the versions of what computed them."""

    model: ModelReport
    baseline: ModelReport | None = None
    versions: Mapping[str, str] = field(default_factory=lambda: library_versions())

    def ratio(self, task: str) -> float | None:
        """Return the model's value over the baseline's for a task; None without a usable baseline."""
        if self.baseline is None:
            return None
        value, reference = (
            next(result.value for result in report.results if result.task == task)
            for report in (self.model, self.baseline)
        )
        return value / reference if reference else None

    def compares_same_data(self, task: str) -> bool:
        """Whether model and baseline saw the same token ids: perplexities per token compare only then."""
        if self.baseline is None:
            return True
        fingerprints = {
            result.data_fingerprint
            for report in (self.model, self.baseline)
            for result in report.results
            if result.task == task
        }
        return len(fingerprints) == 1

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able data. Numbers that JSON has no word for become "Infinity" and "NaN"."""
        tasks = [result.task for result in self.model.results]
        document: dict[str, Any] = {
            "model": _model_dict(self.model),
            "baseline": None if self.baseline is None else _model_dict(self.baseline),
            "versions": dict(self.versions),
        }
        if self.baseline is not None:
            document["comparison"] = {
                task: {"ratio": self.ratio(task), "same_data": self.compares_same_data(task)}
                for task in tasks
            }
        jsonable: dict[str, Any] = _jsonable(document)
        return jsonable


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
    """Write JSON beside ``path`` and rename it into place, so that no half-written file is ever there.

    Raises :class:`StorageError` if the folder cannot be written; a full disk passes as :class:`OSError`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
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
        "results": [
            {
                "task": result.task,
                "metric": result.metric,
                "value": result.value,
                "higher_is_better": result.higher_is_better,
                "convention": result.convention,
                "data_fingerprint": result.data_fingerprint,
                **result.details,
                "seconds": result.seconds,
            }
            for result in report.results
        ],
    }


def _device_name(model: PreTrainedModel) -> str:
    if model.device.type != "cuda":
        return str(model.device)
    import torch

    return f"{model.device} ({torch.cuda.get_device_name(model.device)})"


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
