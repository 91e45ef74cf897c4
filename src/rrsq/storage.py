"""The disk: whether an output may be written and has room, and writing so that it outlives a crash."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO

from .errors import OutputExistsError, RRSQError, StorageError

__all__ = [
    "allocate",
    "check_output",
    "check_space",
    "flush",
    "library_versions",
    "storage_errors",
    "sync_folder",
    "write_whole",
]

# Bytes written at once where a system cannot reserve space.
_ZEROS = 2**24
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
        probe = out.absolute().parent / f".{out.absolute().name}.probe-{os.getpid()}"
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


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or as it was: by a rename, when it is on the disk."""
    new = path.with_name(f"{path.name}.new")
    with new.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    sync_folder(path.parent)


def allocate(file: IO[bytes], size: int) -> None:
    """Take the disk space of a new file, now or never; it is of this size then, and holds zeros."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    for start in range(0, size, _ZEROS):  # macOS, Windows.
        file.write(bytes(min(_ZEROS, size - start)))
    file.flush()
    file.seek(0)


def sync_folder(folder: Path) -> None:
    """Have a folder's entries on the disk: files made in it, and renames."""
    if os.name == "nt":  # Folders cannot be opened there, and need not be.
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush(folder: Path) -> None:
    """Have the files of a folder on the disk, before a rename makes it the output."""
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
