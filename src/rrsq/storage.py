"""Folders that appear whole or not at all: written beside their place and moved there by one rename."""

from __future__ import annotations

import errno
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from .errors import OutputExistsError, RRSQError, StorageError

__all__ = [
    "check_output",
    "check_space",
    "flush",
    "library_versions",
    "remove_abandoned",
    "replace_folder",
    "staging_folder",
    "storage_errors",
]

_VERSIONED = ("rrsq", "torch", "transformers", "safetensors", "tokenizers")


def check_output(
    out: Path, *, overwrite: bool, marker: str = "config.json", kind: str = "a model folder"
) -> None:
    """Refuse an output that cannot be written before any work is done.

    Args:
        out: the folder to be written.
        overwrite: whether it may exist.
        marker: a file that a folder must hold to be replaced.
        kind: what a folder with that file is, for the message.

    Raises:
        OutputExistsError: ``out`` exists and ``overwrite`` is False, or is something rrsq did not make.
        StorageError: its parent cannot be written to.
    """
    if out.exists() or out.is_symlink():
        if not overwrite:
            raise OutputExistsError(
                f"'{out}' exists already. Give --overwrite to replace it, or another folder."
            )
        if not out.is_dir() or (any(out.iterdir()) and not (out / marker).is_file()):
            raise OutputExistsError(f"'{out}' is not {kind}; it is not replaced. Give another folder.")
    with storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        probe = staging_folder(out)
        probe.mkdir()
        probe.rmdir()


def check_space(out: Path, needed: int, what: str = "the checkpoint takes") -> None:
    """Refuse a disk that cannot hold the output before hours are spent on it.

    Args:
        out: the output folder; its parent exists.
        needed: bytes it takes at least.
        what: subject and verb of the message.

    Raises:
        StorageError: less is free.
    """
    free = shutil.disk_usage(out.absolute().parent).free
    if free < needed:
        raise StorageError(
            f"The disk of '{out}' has {free / 1e6:.0f} MB free and {what} {needed / 1e6:.0f} MB"
            " at least. Free some space or choose another folder."
        )


def staging_folder(out: Path) -> Path:
    """The sibling in which this process writes ``out``."""
    return out.absolute().parent / f".{out.absolute().name}.partial-{os.getpid()}"


def remove_abandoned(out: Path) -> None:
    """Remove staging folders of runs that were killed: those whose process is no more."""
    for folder in out.absolute().parent.glob(f".{glob.escape(out.absolute().name)}.partial-*"):
        number = folder.name.rsplit("-", 1)[-1]
        if number.isdigit() and not psutil.pid_exists(int(number)):
            shutil.rmtree(folder, ignore_errors=True)


def replace_folder(staging: Path, out: Path) -> None:
    """Rename ``staging`` to ``out``; an ``out`` that exists is kept until that is done, then removed."""
    if not out.exists():
        staging.rename(out)
        return
    old = out.absolute().parent / f".{out.absolute().name}.old-{os.getpid()}"
    out.rename(old)
    try:
        staging.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def flush(folder: Path) -> None:
    """Have the files on the disk before the rename makes them the output."""
    for path in folder.rglob("*"):
        if not path.is_file():
            continue
        with path.open("rb+") as file:
            os.fsync(file.fileno())


@contextmanager
def storage_errors(out: Path, left: str = "Nothing was left there") -> Iterator[None]:
    """Turn a full disk and what else the system refuses into one :class:`StorageError`."""
    try:
        yield
    except RRSQError:
        raise
    except Exception as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise StorageError(
                f"The disk that holds '{out}' is full. {left}; free some space or choose"
                " another folder, and run the command again."
            ) from error
        if isinstance(error, OSError):
            raise StorageError(f"'{out}' cannot be written: {error.strerror or error}.") from error
        raise


def library_versions() -> dict[str, str]:
    """Versions of rrsq and of the libraries its outputs depend on, those that are installed."""
    found = {}
    for name in _VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
