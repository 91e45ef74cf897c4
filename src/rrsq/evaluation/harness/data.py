"""Where lm-eval's tasks find their data: in a folder laid out like the Hub, else on the Hub.

A task's YAML names its data set by Hub id (``dataset_path: allenai/ai2_arc``). Where the data root holds that
folder, a YAML file is written that includes the task's own and names the folder instead; nothing else of the
task changes.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from rrsq.errors import DataError

__all__ = ["local_folder", "redirected"]

SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


def local_folder(config: Mapping[str, Any], data_root: Path | None) -> Path | None:
    """The folder of a task's data set under the data root; None if there is none."""
    path = config.get("dataset_path")
    if data_root is None or not isinstance(path, str) or Path(path).is_absolute():
        return None
    folder = data_root / path
    return folder.resolve() if folder.is_dir() else None


@contextlib.contextmanager
def redirected(entries: Iterable[Any], data_root: Path | None, num_fewshot: int | None) -> Iterator[None]:
    """Point tasks at their local data while they are built.

    Args:
        entries: of lm-eval's index of tasks; those with local data have another ``yaml_path`` meanwhile.
        data_root: folder laid out like the Hub.
        num_fewshot: examples asked for; None leaves it to each task.

    Raises:
        DataError: a local data set cannot be read, or lacks the split that the task needs.
    """
    original: list[tuple[Any, Path]] = []
    with tempfile.TemporaryDirectory(prefix="rrsq-tasks-") as scratch:
        try:
            for entry in entries:
                folder = local_folder(entry.cfg or {}, data_root)
                if folder is None or entry.yaml_path is None:
                    continue
                overrides = _overrides(entry.name, entry.cfg, folder, num_fewshot)
                text = yaml.safe_dump({"include": str(entry.yaml_path), **overrides})
                path = Path(scratch) / f"{len(original)}.yaml"
                path.write_text(text, encoding="utf-8")
                original.append((entry, entry.yaml_path))
                entry.yaml_path = path
            yield
        finally:
            for entry, path in original:
                entry.yaml_path = path


def _overrides(task: str, config: Mapping[str, Any], folder: Path, num_fewshot: int | None) -> dict[str, Any]:
    """The fields of a task that local data change: the data set, and splits that are not there."""
    there = _splits(task, config, folder)
    named: dict[str, str] = {key: config[key] for key in SPLITS if config.get(key) is not None}
    asked_in = named.get("test_split") or named.get("validation_split")
    needed = {asked_in} if asked_in else set()
    has_samples = "samples" in (config.get("fewshot_config") or {})
    if _shots(config, num_fewshot) and not has_samples:
        places = ("fewshot_split", "training_split", "validation_split", "test_split")
        needed |= {named[key] for key in [key for key in places if key in named][:1]}
    missing = sorted(needed - set(there))
    if missing:
        raise DataError(
            f"Task '{task}' needs the split '{missing[0]}' of its data set, and {folder} holds only "
            f"{', '.join(there) or 'none'}. Copy that split of {config['dataset_path']} there from the Hub."
        )
    absent = [key for key, split in named.items() if split not in there]
    return {"dataset_path": str(folder), **dict.fromkeys(absent)}


def _shots(config: Mapping[str, Any], num_fewshot: int | None) -> int:
    """Examples before each question, as lm-eval decides: a task that says 0 keeps it."""
    own = config.get("num_fewshot")
    return int(own or 0) if num_fewshot is None or own == 0 else num_fewshot


def _splits(task: str, config: Mapping[str, Any], folder: Path) -> list[str]:
    from datasets import get_dataset_split_names

    try:
        return list(get_dataset_split_names(str(folder), config.get("dataset_name")))
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise DataError(
            f"The data of task '{task}' in {folder} cannot be read: "
            f"{(reason[0] if reason else type(error).__name__).rstrip('.')}. It should be laid out like "
            f"{config['dataset_path']} on the Hub."
        ) from error
