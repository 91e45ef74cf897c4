"""What ``rrsq eval --tasks`` can measure: the task interface and the registry of names.

A task is named ``kind`` or ``kind:argument`` (``wikitext2``, ``text:notes.txt``). To add one, write a module
with a class that satisfies :class:`Task`, put ``@register_task("kind", ...)`` on a function that makes it,
and add the module to :data:`TASK_MODULES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rrsq.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Task", "TaskKind", "TaskOptions", "TaskResult", "parse_tasks", "register_task", "task_kinds"]

TASK_MODULES = ("rrsq.evaluation.text_perplexity",)
"""Modules that register tasks; they are imported when a task is first asked for."""


@dataclass(frozen=True)
class TaskOptions:
    """What all tasks are told. A task ignores what does not concern it."""

    sequence_length: int = 2048
    """Tokens in a window."""
    limit: int | None = None
    """Windows (or questions) at most; None means all."""
    batch_size: int = 1
    data_root: Path | None = None
    """Folder laid out like the Hub, looked in before it."""
    on_progress: Callable[[int, int, str], None] | None = None
    """Called with the items done, the items in all, and the result so far in words."""


@dataclass(frozen=True)
class TaskResult:
    """One task on one model."""

    task: str
    metric: str
    """Name of the headline number, such as ``perplexity`` or ``accuracy``."""
    value: float
    higher_is_better: bool
    convention: str
    """One sentence that says how the number is computed."""
    seconds: float
    data_fingerprint: str
    """Equal for two models only if they were given the same token ids (or questions)."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Further numbers, JSON-able."""


class Task(Protocol):
    """Something that a model can be measured on."""

    @property
    def name(self) -> str:
        """The name it was asked for by."""

    def prepare(self, options: TaskOptions) -> None:
        """Fetch the data, so that a missing file is found before a model is loaded."""

    def run(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: TaskOptions
    ) -> TaskResult:
        """Measure the model. Called after :meth:`prepare`, once for each model compared."""


TaskFactory = Callable[[str], Task]


@dataclass(frozen=True)
class TaskKind:
    """An entry of the registry."""

    kind: str
    argument: str | None
    """What stands after the colon, in words; None if nothing may."""
    factory: TaskFactory


_REGISTRY: dict[str, TaskKind] = {}


def register_task(kind: str, *, argument: str | None = None) -> Callable[[TaskFactory], TaskFactory]:
    """Register a function from the argument (an empty string where the kind takes none) to a task."""

    def register(factory: TaskFactory) -> TaskFactory:
        _REGISTRY[kind] = TaskKind(kind, argument, factory)
        return factory

    return register


def task_kinds() -> Mapping[str, TaskKind]:
    """Return all registered kinds by name."""
    for module in TASK_MODULES:
        importlib.import_module(module)
    return dict(_REGISTRY)


def parse_tasks(specification: str) -> list[Task]:
    """Read a comma-separated list of tasks. Raises :class:`UsageError` for an unknown or incomplete one."""
    names = [name.strip() for name in specification.split(",") if name.strip()]
    if not names:
        raise UsageError("No task was named. Example: --tasks wikitext2,text:notes.txt")
    return [_make_task(name) for name in dict.fromkeys(names)]


def _make_task(name: str) -> Task:
    kinds = task_kinds()
    kind_name, separator, argument = name.partition(":")
    if kind_name not in kinds:
        known = ", ".join(_usage(kind) for kind in kinds.values())
        raise UsageError(f"There is no task '{name}'.{did_you_mean(kind_name, kinds)} Known tasks: {known}.")
    kind = kinds[kind_name]
    if (kind.argument is None) == bool(separator) or (separator and not argument):
        raise UsageError(f"Task '{name}' is not complete or says too much: write {_usage(kind)}.")
    return kind.factory(argument)


def _usage(kind: TaskKind) -> str:
    return kind.kind if kind.argument is None else f"{kind.kind}:{kind.argument}"
