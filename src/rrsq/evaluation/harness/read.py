"""From the document that lm-eval returns to results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from lm_eval.api.group import Group

from rrsq.evaluation.harness.catalogue import PreparedTask, PreparedTasks
from rrsq.evaluation.results import Metric, TaskResult
from rrsq.evaluation.tasks import TaskOptions

__all__ = ["read_results"]

HEADLINES = ("acc_norm", "acc", "exact_match")
"""The metric to quote, in order: length-normalized accuracy where the task has it, as QuaRot's tables do."""


def read_results(
    document: Mapping[str, Any], prepared: PreparedTasks, options: TaskOptions, seconds: float
) -> dict[str, list[TaskResult]]:
    """Return by the name asked for one result; of a tag, one for each of its tasks.

    The time is that of the whole call, shared among the tasks by the length of their texts.
    """
    results: dict[str, list[TaskResult]] = {entry.asked: [] for entry in prepared.entries}
    lengths = {task.task_name: _characters(task) for task in prepared.tasks()}
    in_all = max(1, sum(lengths.values()))
    for entry in prepared.entries:
        for item in entry.built:
            tasks = item.get_all_tasks() if isinstance(item, Group) else [item]
            share = sum(lengths[task.task_name] for task in tasks) / in_all
            results[entry.asked] += _results_of(document, entry, item, tasks, options, seconds * share)
    return results


def _characters(task: Any) -> int:
    return sum(len(str(argument)) for instance in task.instances for argument in instance.args)


def _results_of(
    document: Mapping[str, Any],
    entry: PreparedTask,
    item: Any,
    tasks: list[Any],
    options: TaskOptions,
    seconds: float,
) -> list[TaskResult]:
    """The result of a task or of a group that lm-eval averages; of another group, those of its tasks."""
    name = item.name if isinstance(item, Group) else item.task_name
    if isinstance(item, Group) and not item.has_aggregation:
        each = seconds / len(tasks)
        return [
            result for task in tasks for result in _results_of(document, entry, task, [task], options, each)
        ]
    metrics = _metrics(document, name)
    details: dict[str, Any] = {"lm_eval_task": name, "num_fewshot": document["n-shot"].get(name)}
    details["num_questions"] = sum(document["n-samples"][task.task_name]["effective"] for task in tasks)
    if isinstance(item, Group):
        details["tasks"] = {
            task.task_name: {metric.name: metric.value for metric in _metrics(document, task.task_name)}
            for task in tasks
        }
    return [
        TaskResult(
            task=entry.asked if name == entry.name else name,
            metrics=metrics,
            convention=_convention(document, name, tasks, options, details, metrics),
            seconds=seconds,
            data_fingerprint=_fingerprint(tasks),
            details=details,
        )
    ]


def _metrics(document: Mapping[str, Any], name: str) -> tuple[Metric, ...]:
    """The metrics of a task or group, the headline first. lm-eval writes them as ``metric,filter``."""
    values: Mapping[str, Any] = document["results"][name]
    better: Mapping[str, Any] = document["higher_is_better"].get(name, {})
    found: list[Metric] = []
    for key, value in values.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = values.get(f"{metric}_stderr,{filter_name}")
        found.append(
            Metric(
                name=metric if filter_name == "none" else f"{metric} ({filter_name})",
                value=float(value),
                higher_is_better=better.get(metric) is not False,
                stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
            )
        )
    order = {metric: rank for rank, metric in enumerate(HEADLINES)}
    return tuple(sorted(found, key=lambda metric: order.get(metric.name, len(order))))


def _convention(
    document: Mapping[str, Any],
    name: str,
    tasks: list[Any],
    options: TaskOptions,
    details: Mapping[str, Any],
    metrics: tuple[Metric, ...],
) -> str:
    asked = f"all {details['num_questions']} questions"
    if options.limit is not None:
        each = " of each of its tasks" if len(tasks) > 1 else ""
        asked = f"the first {options.limit} questions{each} at most, {details['num_questions']} in all"
    names = {metric.name for metric in metrics}
    norm = "; acc_norm divides an answer's log-likelihood by its bytes" if "acc_norm" in names else ""
    return (
        f"lm-eval {version('lm_eval')}, task {name} (version {document['versions'].get(name)}), "
        f"{details['num_fewshot'] or 0}-shot, {asked}{norm}; ± is the standard error over the questions."
    )


def _fingerprint(tasks: list[Any]) -> str:
    """SHA-256 (hex) of every text that the model was given."""
    digest = hashlib.sha256()
    for task in tasks:
        for instance in task.instances:
            digest.update(json.dumps(instance.args, default=str).encode())
    return digest.hexdigest()
