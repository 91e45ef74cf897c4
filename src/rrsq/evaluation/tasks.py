"""What ``rrsq eval --tasks`` can measure: the task interface and the registry of names.

A task is named ``kind`` or ``kind:argument`` (``wikitext2``, ``text:notes.txt``). To add one, write a module
with a class that satisfies :class:`Task`, put ``@register_task("kind", ...)`` on a function that makes it,
and add the module to :data:`TASK_MODULES`. A name without a colon that is no kind belongs to lm-eval; all
such names of a run become one task (:mod:`rrsq.evaluation.harness`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rrsq.errors import UsageError, did_you_mean
from rrsq.evaluation.results import TaskResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rrsq.evaluation.reference import Reference
    from rrsq.quantizer.calibration.windows import BosChoice

__all__ = ["Task", "TaskKind", "TaskOptions", "parse_tasks", "register_task", "task_kinds"]

TASK_MODULES = (
    "rrsq.evaluation.text_perplexity",
    "rrsq.evaluation.divergence_task",
    "rrsq.evaluation.needle_task",
)
"""Modules that register tasks; they are imported when a task is first asked for."""


@dataclass(frozen=True)
class TaskOptions:
    """What all tasks are told. A task ignores what does not concern it."""

    sequence_length: int = 2048
    """Tokens in a window."""
    bos: BosChoice = "auto"
    """Whether each window begins with the BOS token; ``auto``: if the model's family needs it."""
    limit: int | None = None
    """The first so many windows of a text, or questions of a task; None means all."""
    batch_size: int | None = None
    """Windows or questions to run at a time; None: found from the memory that is free."""
    num_fewshot: int | None = None
    """Solved examples before each question; None: what lm-eval's task says, mostly none."""
    context: tuple[int, ...] = (2048, 8192)
    """Tokens of a needle test's texts, a result for each."""
    depths: tuple[int, ...] = (0, 25, 50, 75, 100)
    """Where its needles stand, in percent of the text."""
    data_root: Path | None = None
    """Folder laid out like the Hub, looked in before it."""
    reference: Reference | None = None
    """The model that this one is compared with; set only for tasks that need it."""
    on_progress: Callable[[int, int, str], None] | None = None
    """Called with the items done, the items in all, and the result so far in words."""


class Task(Protocol):
    """Something that a model can be measured on."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names it was asked for by: one, or several that are run together."""

    @property
    def needs_reference(self) -> bool:
        """Whether it compares with a reference model, which it is then not run on itself."""

    @property
    def over_windows(self) -> bool:
        """Whether it reads a text in windows, rather than asking questions."""

    def prepare(self, options: TaskOptions) -> None:
        """Fetch the data, so that a missing file is found before a model is loaded."""

    def data_keys(self) -> Mapping[str, str]:
        """By name, a digest of the data that :meth:`prepare` fetched."""

    def select(self, names: Sequence[str]) -> Task:
        """This task, prepared as it is, for some of its names only."""

    def run(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: TaskOptions
    ) -> Mapping[str, Sequence[TaskResult]]:
        """Measure the model; results by name, mostly one each.

        Called after :meth:`prepare`, once for each model compared.
        """


TaskFactory = Callable[[str], Task]


@dataclass(frozen=True)
class TaskKind:
    """An entry of the registry."""

    kind: str
    argument: str | None
    """What stands after the colon, in words; None if nothing may."""
    default: str | None
    """The argument that is meant without a colon; None if it must be given."""
    factory: TaskFactory

    @property
    def must_be_given(self) -> bool:
        """Whether its name without an argument says nothing."""
        return self.argument is not None and self.default is None


_REGISTRY: dict[str, TaskKind] = {}


def register_task(
    kind: str, *, argument: str | None = None, default: str | None = None
) -> Callable[[TaskFactory], TaskFactory]:
    """Register a function from the argument (an empty string where the kind takes none) to a task."""

    def register(factory: TaskFactory) -> TaskFactory:
        _REGISTRY[kind] = TaskKind(kind, argument, default, factory)
        return factory

    return register


def task_kinds() -> Mapping[str, TaskKind]:
    """Return all registered kinds by name."""
    for module in TASK_MODULES:
        importlib.import_module(module)
    return dict(_REGISTRY)


def parse_tasks(specification: str) -> list[Task]:
    """Read a comma-separated list of tasks; those of lm-eval come last, as one.

    Raises :class:`UsageError` for an incomplete one. Whether lm-eval has a task is found when it is prepared.
    """
    from rrsq.evaluation.harness.task import HarnessTasks

    names = [name.strip() for name in specification.split(",") if name.strip()]
    if not names:
        raise UsageError("No task was named. Example: --tasks wikitext2,text:notes.txt,arc_e")
    kinds = task_kinds()
    own: list[Task] = []
    foreign: list[str] = []
    for name in dict.fromkeys(names):
        if ":" not in name and name not in kinds:
            foreign.append(name)
        else:
            own.append(_make_task(name, kinds))
    return [*own, HarnessTasks(tuple(foreign))] if foreign else own


def _make_task(name: str, kinds: Mapping[str, TaskKind]) -> Task:
    kind_name, separator, argument = name.partition(":")
    if kind_name not in kinds:
        known = ", ".join(_usage(kind) for kind in kinds.values())
        raise UsageError(f"There is no task '{name}'.{did_you_mean(kind_name, kinds)} Known tasks: {known}.")
    kind = kinds[kind_name]
    if not separator and kind.default is not None:
        return kind.factory(kind.default)
    if (kind.argument is None) == bool(separator) or (separator and not argument):
        raise UsageError(f"Task '{name}' is not complete or says too much: write {_usage(kind)}.")
    return kind.factory(argument)


def _usage(kind: TaskKind) -> str:
    if kind.argument is None:
        return kind.kind
    return f"{kind.kind}:{kind.argument}" if kind.default is None else f"{kind.kind}[:{kind.argument}]"
