"""Measuring models: the steps of ``rrsq eval``, without a terminal."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rrsq.errors import UsageError
from rrsq.evaluation.results import TaskResult
from rrsq.evaluation.scores import ModelReport
from rrsq.evaluation.tasks import Task, TaskOptions
from rrsq.evaluation.vocabulary import require_same_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rrsq.evaluation.reference import Reference

__all__ = [
    "StepCallback",
    "check_comparison",
    "evaluate_models",
    "prepare_tasks",
    "release_memory",
    "run_tasks",
]

StepCallback = Callable[[str, str, int, int, str], None]
"""Called with the model's path (empty before the first), what is done with it (a task's names, or loading),
the items done and in all (0 while that is not known), and the result so far in words."""


def prepare_tasks(tasks: Sequence[Task], options: TaskOptions) -> None:
    """Fetch the data of all tasks, so that what is missing is found before a model is loaded."""
    for task in tasks:
        task.prepare(options)


def check_comparison(models: Sequence[str], tasks: Sequence[Task], options: TaskOptions) -> None:
    """Refuse a comparison that cannot be made, before a model is loaded.

    Args:
        models: paths, the reference first.
        tasks: what is to be measured.
        options: for the data root.

    Raises:
        ModelLoadError: a tokenizer cannot be found.
        UsageError: tokenizers differ, a model is named twice, or a task needs a reference beside the model.
    """
    from rrsq.runtime.format.loading import load_tokenizer

    lonely = [name for task in tasks if task.needs_reference for name in task.names]
    if len(models) == 1 and lonely:
        raise UsageError(
            f"Task '{lonely[0]}' compares with a reference model. Name the full-precision model first: "
            f"rrsq eval FULL_PRECISION {models[0]} --tasks {lonely[0]}"
        )
    written = [path.rstrip("/") for path in models]
    repeated = [path for index, path in enumerate(written) if path in written[:index]]
    if repeated:
        raise UsageError(f"'{repeated[0]}' is named twice. Name each model once, the reference first.")
    if len(models) > 1:
        tokenizers = [load_tokenizer(path, options.data_root) for path in models]
        for path, tokenizer in zip(models[1:], tokenizers[1:], strict=True):
            require_same_tokenizer(models[0], tokenizers[0], path, tokenizer)


def evaluate_models(
    models: Sequence[str],
    tasks: Sequence[Task],
    options: TaskOptions,
    *,
    device: str,
    dtype: str = "auto",
    on_step: StepCallback = lambda model, doing, done, total, text: None,
) -> list[ModelReport]:
    """Run prepared tasks on one model after the other.

    Only one model is held at a time, unless a task needs the first one, the reference, beside the others.
    The reference runs once over each text.

    Args:
        models: paths or Hub ids, the reference first.
        tasks: prepared.
        options: for all tasks; ``reference`` and ``on_progress`` are set here.
        device: as :func:`load_model` takes it.
        dtype: of what is not quantized, as :func:`load_model` takes it.
        on_step: told of progress.
    """
    from rrsq.evaluation.reference import Reference
    from rrsq.runtime.format.loading import load_model, load_tokenizer

    keep = len(models) > 1 and any(task.needs_reference for task in tasks)
    reports: list[ModelReport] = []
    reference: Reference | None = None
    for index, path in enumerate(models):
        on_step(path, "loading", 0, 0, "")
        tokenizer = load_tokenizer(path, data_root=options.data_root)
        model = load_model(path, device=device, dtype=dtype, data_root=options.data_root)
        measured = run_tasks(path, model, tokenizer, tasks, replace(options, reference=reference), on_step)
        results = tuple(result for several in measured.values() for result in several)
        reports.append(ModelReport.of(path, model, results))
        if keep and index == 0:
            reference = Reference(model)
        del model
        release_memory()
    return reports


def run_tasks(
    path: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    options: TaskOptions,
    on_step: StepCallback = lambda model, doing, done, total, text: None,
) -> dict[str, Sequence[TaskResult]]:
    """Run prepared tasks on a loaded model; those that need a reference only where ``options`` has one.

    Returns:
        The results by the name that was asked for.
    """
    results: dict[str, Sequence[TaskResult]] = {}
    for task in tasks:
        if task.needs_reference and options.reference is None:
            continue
        doing = ", ".join(task.names)

        def on_progress(done: int, total: int, so_far: str, doing: str = doing) -> None:
            on_step(path, doing, done, total, so_far)

        on_step(path, doing, 0, 0, "")
        results.update(task.run(model, tokenizer, replace(options, on_progress=on_progress)))
    return results


def release_memory() -> None:
    """Give back what a model that is no longer referenced held, on the GPU too."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
