"""Finding lm-eval's tasks by name and building them on the data at hand. Imports lm-eval."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.api.group import Group
from lm_eval.tasks import TaskManager

from rrsq.errors import DataError, RRSQError, UsageError
from rrsq.evaluation.harness.data import local_folder, redirected
from rrsq.evaluation.harness.names import SHORT_NAMES, known_task
from rrsq.evaluation.tasks import task_kinds
from rrsq.quantizer.calibration.text import DATA_ROOT_VARIABLE, resolve_data_root

__all__ = ["PreparedTask", "PreparedTasks", "prepare_tasks"]


@dataclass(frozen=True)
class PreparedTask:
    """One name that was asked for."""

    asked: str
    name: str
    """lm-eval's."""
    built: tuple[Any, ...]
    """lm-eval's Task or Group; of a tag, the tasks it stands for."""

    def tasks(self) -> Iterator[Any]:
        """The tasks with questions of their own."""
        for item in self.built:
            yield from item.get_all_tasks() if isinstance(item, Group) else (item,)


@dataclass(frozen=True)
class PreparedTasks:
    """All that was asked for."""

    entries: tuple[PreparedTask, ...]

    def select(self, names: Sequence[str]) -> PreparedTasks:
        """Those of some of the names that were asked for."""
        return PreparedTasks(tuple(entry for entry in self.entries if entry.asked in names))

    def tasks(self) -> Iterator[Any]:
        """All tasks with questions of their own."""
        for entry in self.entries:
            yield from entry.tasks()

    def loaded(self) -> dict[str, dict[str, Any]]:
        """Tasks and groups by name, as lm-eval's ``evaluate`` takes them."""
        groups = [item for entry in self.entries for item in entry.built if isinstance(item, Group)]
        nested = [group for item in groups for group in item.get_all_groups()]
        return {
            "tasks": {task.task_name: task for task in self.tasks()},
            "groups": {group.name: group for group in [*groups, *nested]},
        }


def prepare_tasks(names: Sequence[str], data_root: Path | None, num_fewshot: int | None) -> PreparedTasks:
    """Find tasks and load their data.

    Args:
        names: short names or lm-eval's names of tasks, groups and tags.
        data_root: folder laid out like the Hub, else ``RRSQ_DATA_ROOT``.
        num_fewshot: examples before each question; None leaves it to each task.

    Raises:
        UsageError: there is no such task, or a task was named twice.
        DataError: the data of a task are neither under the data root nor on the Hub.
    """
    root = resolve_data_root(data_root)
    wanted = {name: (known.name if (known := known_task(name)) else name) for name in names}
    manager = _manager(wanted)
    leaves = {leaf for name in wanted.values() for leaf in _leaves(manager.task_index, name)}
    with redirected([manager.task_index[leaf] for leaf in sorted(leaves)], root, num_fewshot):
        entries = tuple(
            PreparedTask(asked, name, _build(manager, asked, name, root)) for asked, name in wanted.items()
        )
    prepared = PreparedTasks(entries)
    _refuse_repetition(prepared)
    return prepared


def _manager(wanted: dict[str, str]) -> TaskManager:
    """lm-eval's index of the folders that hold the tasks; of all, in seconds, if one is elsewhere."""
    known = [known_task(name) for name in wanted]
    if all(known):
        tasks = Path(lm_eval.tasks.__file__).parent
        folders = sorted({str(tasks / task.folder) for task in known if task is not None})
        manager = TaskManager(include_path=folders, include_defaults=False)
        if all(name in manager.task_index for name in wanted.values()):
            return manager
    manager = _whole_catalogue()
    unknown = [asked for asked, name in wanted.items() if name not in manager.task_index]
    if unknown:
        raise UsageError(_no_such_task(unknown[0], manager.task_index))
    return manager


@functools.cache
def _whole_catalogue() -> TaskManager:
    return TaskManager()


def _no_such_task(name: str, index: Iterable[str]) -> str:
    own = [*task_kinds(), *SHORT_NAMES]
    near = dict.fromkeys(
        [*difflib.get_close_matches(name, own, n=3, cutoff=0.5), *difflib.get_close_matches(name, index, n=3)]
    )
    hint = f" Did you mean {' or '.join(repr(one) for one in list(near)[:4])}?" if near else ""
    return (
        f"There is no task '{name}'.{hint} Known are {', '.join(own)}, and all tasks of lm-eval "
        "('lm-eval ls tasks' lists them)."
    )


def _leaves(index: Mapping[str, Any], item: Any) -> Iterator[str]:
    """Names of the tasks that a task, a group, a tag or a member of a group stands for."""
    if isinstance(item, list):
        for member in item:
            yield from _leaves(index, member)
    elif isinstance(item, dict):
        yield from _leaves(index, item["group"] if item.get("group") in index else item.get("task"))
    elif item in index:
        entry = index[item]
        if entry.kind.name == "TAG":
            yield from _leaves(index, sorted(entry.tags))
        elif entry.kind.name == "GROUP":
            yield from _leaves(index, (entry.cfg or {}).get("task"))
        else:
            yield item


def _build(manager: TaskManager, asked: str, name: str, root: Path | None) -> tuple[Any, ...]:
    """Let lm-eval build a task, group or tag, which loads its data."""
    try:
        loaded = manager.load([name])
    except RRSQError:
        raise
    except Exception as error:
        raise _data_error(manager, asked, name, root, error) from error
    groups = loaded.get("groups", {})
    return (groups[name],) if name in groups else tuple(loaded["tasks"].values())


def _data_error(
    manager: TaskManager, asked: str, name: str, root: Path | None, error: Exception
) -> DataError:
    """Say which data set is missing and where it was looked for."""
    lines = str(error).strip().splitlines()
    reason = (lines[0] if lines else type(error).__name__).rstrip(".")
    configs = [manager.task_index[leaf].cfg or {} for leaf in _leaves(manager.task_index, name)]
    missing = {
        str(config["dataset_path"])
        for config in configs
        if config.get("dataset_path") and local_folder(config, root) is None
    }
    if not missing:
        return DataError(f"The data of task '{asked}' cannot be used: {reason}.")
    needed = ", ".join(sorted(missing))
    looked = " (none is set)"
    if root is not None:
        looked = f"; looked in {', '.join(str(root / path) for path in sorted(missing))}, which is not there"
    return DataError(
        f"Task '{asked}' needs the data set {needed}, which cannot be fetched from the Hub ({reason}).\n"
        f"To use local data, give --data-root or {DATA_ROOT_VARIABLE} a folder laid out like the Hub, "
        f"holding {needed}/{looked}."
    )


def _refuse_repetition(prepared: PreparedTasks) -> None:
    seen: dict[str, str] = {}
    for entry in prepared.entries:
        for task in entry.tasks():
            first = seen.setdefault(task.task_name, entry.asked)
            if first != entry.asked:
                raise UsageError(
                    f"'{first}' and '{entry.asked}' both hold lm-eval's task '{task.task_name}'. "
                    "Name it only once."
                )
