"""What a shell offers behind Tab: names of recipes, schemes, tasks and models."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["complete_model", "complete_recipe", "complete_scheme", "complete_tasks"]


def complete_recipe(incomplete: str) -> list[str]:
    """Named recipes, and YAML files."""
    from rrsq.recipe import recipe_names

    names = [name for name in recipe_names() if name.startswith(incomplete)]
    return [*names, *_paths(incomplete, (".yaml", ".yml"))]


def complete_scheme(incomplete: str) -> list[str]:
    """Schemes."""
    from rrsq.schemes import SCHEMES

    return [name for name in SCHEMES if name.startswith(incomplete.upper())]


def complete_tasks(incomplete: str) -> list[str]:
    """The last task of a list with commas; what stands before it stays, and is not offered again."""
    from rrsq.evaluation.harness.names import SHORT_NAMES
    from rrsq.evaluation.tasks import task_kinds

    before, comma, last = incomplete.rpartition(",")
    kinds = [f"{name}:" if kind.must_be_given else name for name, kind in task_kinds().items()]
    named = before.split(",")
    names = [name for name in (*kinds, *SHORT_NAMES) if name.startswith(last) and name not in named]
    return [f"{before}{comma}{name}" for name in names]


def complete_model(incomplete: str) -> list[str]:
    """Folders and ``.gguf`` files, and the Hub ids at hand: of the data root and the Hub's cache."""
    ids = sorted({name for name in _ids() if name.startswith(incomplete)})
    return [*ids, *_paths(incomplete, (".gguf",))]


def _ids() -> Iterator[str]:
    root = os.environ.get("RRSQ_DATA_ROOT")
    if root:
        for config in Path(root).glob("*/*/config.json"):
            yield "/".join(config.parts[-3:-1])
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    for folder in Path(os.environ.get("HF_HUB_CACHE", home / "hub")).glob("models--*--*"):
        yield folder.name.removeprefix("models--").replace("--", "/", 1)


def _paths(incomplete: str, suffixes: tuple[str, ...]) -> list[str]:
    """Folders, with a slash, and files of these kinds that begin with what is typed."""
    folder, slash, start = incomplete.rpartition("/")
    try:
        entries = sorted(Path(folder + slash or ".").expanduser().iterdir())
    except OSError:
        return []
    found = []
    for entry in entries:
        if entry.name.startswith(start) and (start or not entry.name.startswith(".")):
            if entry.is_dir():
                found.append(f"{folder}{slash}{entry.name}/")
            elif entry.suffix in suffixes:
                found.append(f"{folder}{slash}{entry.name}")
    return found
