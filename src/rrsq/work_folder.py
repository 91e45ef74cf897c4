"""The folder beside an output in which a long run works, and from which it goes on after a stop.

It holds a lock, a manifest, the output as far as it is made (``out``), and what the run needs to go on. The
manifest is written, by rename, after all that it speaks of is on the disk: at whatever moment a process dies,
the manifest and what it names fit each other.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import InterruptedRunError, OutputExistsError, ResumeError, StorageError
from .storage import storage_errors, sync_folder, write_whole

try:
    import fcntl
except ImportError:  # Windows.
    fcntl = None  # type: ignore[assignment]

__all__ = ["LOCK", "Manifest", "WorkFolder", "changed", "locked", "was_published", "work_path"]

LOCK = "lock"
_FORMAT = 2
_MANIFEST, _STAGING, _REPLACED = "manifest.json", "out", "replaced"


@dataclass
class Manifest:
    """What a work folder holds.

    Attributes:
        kind: what is made, in one word for messages, such as ``quantization``.
        identity: what the result depends on: the recipe, the model, the text and so on, as hashes or plain
            data by name. A run goes on only where all of it is the same.
        finished: finished layers. A folder without any is not worth keeping.
        record: what the run itself must know again to go on, as plain data.
        whole: the output is whole and on the disk; nothing is left to do but to publish it.
    """

    kind: str
    identity: dict[str, Any]
    finished: int = 0
    record: dict[str, Any] = field(default_factory=dict)
    whole: bool = False


def work_path(out: Path) -> Path:
    """The work folder of an output."""
    return out.absolute().parent / f".{out.absolute().name}.work"


def was_published(out: Path) -> bool:
    """Whether ``out`` is the result of a run that was stopped just before it removed its work folder."""
    work = work_path(out)
    try:
        manifest = _read(work)
    except StorageError:
        return False
    return manifest is not None and manifest.whole and not (work / _STAGING).exists()


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of what is not as it was."""
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


class WorkFolder:
    """A work folder that this process has locked (:meth:`locked`), or shares with one that has.

    Args:
        out: the output.
        manifest: what the folder holds.
    """

    def __init__(self, out: Path, manifest: Manifest) -> None:
        self.out = out.absolute()
        self.path = work_path(out)
        self.manifest = manifest

    @property
    def staging(self) -> Path:
        """The folder that becomes the output; whoever works here makes it."""
        return self.path / _STAGING

    @property
    def made(self) -> Path:
        """Where what is made is: the staging folder, or the output if it was published already."""
        return self.staging if self.staging.exists() or not self.manifest.whole else self.out

    @classmethod
    @contextmanager
    def locked(
        cls, out: Path, kind: str, identity: dict[str, Any], *, restart: bool = False
    ) -> Iterator[WorkFolder]:
        """Take the work folder of an output, with what an earlier run of the same identity left in it.

        It stays after a failure if a layer is finished, else it is removed.

        Args:
            out: the output.
            kind: see :class:`Manifest`.
            identity: see :class:`Manifest`.
            restart: throw away what an earlier run left.

        Raises:
            InterruptedRunError: the user stopped what is done inside.
            ResumeError: an earlier run left finished layers and was not of this identity.
            StorageError: another process is at work on the same output; the folder is damaged; or the disk is
                full or cannot be written to, inside too.
        """
        work = work_path(out)
        shutil.rmtree(_done_path(out), ignore_errors=True)
        with storage_errors(out, left=_kept_in(work)), locked(work, out):
            manifest = None if restart else _read(work)
            new = Manifest(kind, identity)
            if manifest is not None and (manifest.kind, manifest.identity) != (kind, identity):
                if manifest.finished:
                    raise _of_another_run(manifest, new, work)
                manifest = None
            if manifest is None:
                manifest = new
                _put_back(work, out)
                _empty(work)
            folder = cls(out, manifest)
            try:
                folder.save()
                with folder._interruptible():
                    yield folder
            except BaseException:
                if not manifest.finished:
                    with suppress(OSError):
                        folder._remove()
                raise

    @classmethod
    @contextmanager
    def shared(cls, out: Path, kind: str, identity: dict[str, Any]) -> Iterator[WorkFolder]:
        """The folder that another process of the same run has locked, to read from it."""
        folder = cls(out, _read(work_path(out)) or Manifest(kind, identity))
        with storage_errors(out, left=_kept_in(folder.path)), folder._interruptible():
            yield folder

    def advance(self, finished: int) -> None:
        """So many layers are finished, and what they left is on the disk."""
        self.manifest.finished = finished
        self.save()

    def finish(self) -> None:
        """The output in the staging folder is whole, and on the disk."""
        self.manifest.whole = True
        self.save()

    def save(self) -> None:
        """Have the manifest on the disk, where all that it speaks of is."""
        write_whole(self.path / _MANIFEST, json.dumps({"format": _FORMAT, **vars(self.manifest)}, indent=1))

    def damaged(self) -> StorageError:
        """The error for contents that are not what the manifest says."""
        return StorageError(
            f"'{self.path}', which holds an unfinished {self.manifest.kind}, is damaged. Give --restart to"
            f" throw its {self.manifest.finished} finished layers away and begin again."
        )

    def publish(self, *, overwrite: bool) -> None:
        """Turn the staging folder into the output and remove the rest; may be repeated after a stop.

        The manifest says ``whole`` by then.

        Raises:
            OutputExistsError: the output has appeared in the meantime.
        """
        replaced = self.path / _REPLACED
        if self.staging.exists():
            if self.out.exists():
                if not overwrite:
                    raise OutputExistsError(
                        f"'{self.out}' has appeared while it was being made. Give --overwrite to replace it:"
                        " all layers are finished."
                    )
                shutil.rmtree(replaced, ignore_errors=True)
                self.out.rename(replaced)
            try:
                self.staging.rename(self.out)
            except OSError:
                _put_back(self.path, self.out)
                raise
            sync_folder(self.out.parent)
        self._remove()

    def _remove(self) -> None:
        """By a rename: as long as the folder is there, it is whole, and its manifest says what is."""
        done = _done_path(self.out)
        shutil.rmtree(done, ignore_errors=True)
        self.path.rename(done)
        sync_folder(self.out.parent)
        shutil.rmtree(done, ignore_errors=True)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt as interrupt:
            kept = "before a layer was finished; nothing was left."
            if self.manifest.finished:
                kept = (
                    f"before it was done. {self.manifest.finished} finished layers are kept in"
                    f" '{self.path}': the same command goes on from there."
                )
            raise InterruptedRunError(f"stopped by the user {kept}") from interrupt


@contextmanager
def locked(folder: Path, out: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made if need be; the system lets go of it however a process ends.

    Args:
        folder: in which the file of the lock is.
        out: what is made there, for the message.

    Raises:
        OSError: the folder cannot be written to.
        StorageError: another process has the lock, or this system has no locks.
    """
    lock = folder / LOCK
    descriptor = _acquire(lock, out)
    try:
        yield
    finally:
        # If the folder is gone, the file at that place may be another process's lock.
        with suppress(OSError):
            if _is_open_at(lock, descriptor):
                lock.unlink()
        os.close(descriptor)


def _acquire(lock: Path, out: Path) -> int:
    """The file descriptor that holds a lock."""
    if fcntl is None:
        raise StorageError(
            f"rrsq keeps two processes off one folder by a lock (flock) that {sys.platform} does not have."
            " Run it on Linux or macOS, or in the Windows Subsystem for Linux."
        )
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # Its owner removed the folder just now.
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise StorageError(
                f"Another process is making '{out}' now (it holds '{lock}'). Wait for it, or choose another"
                " folder."
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
        # The owner before may have removed the file between opening and locking it.
        if _is_open_at(lock, descriptor):
            return descriptor
        os.close(descriptor)


def _is_open_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _of_another_run(manifest: Manifest, now: Manifest, work: Path) -> ResumeError:
    names = changed(manifest.identity, now.identity) if manifest.kind == now.kind else ["the command"]
    return ResumeError(
        f"'{work}' holds an unfinished {manifest.kind} of {manifest.finished} layers, and since then"
        f" {' and '.join(names)} changed. Give the command of that run to go on with it, or --restart to"
        " throw it away."
    )


def _read(work: Path) -> Manifest | None:
    """The manifest of a work folder, or None where there is none."""
    try:
        data = json.loads((work / _MANIFEST).read_text(encoding="utf-8"))
        if data.pop("format") != _FORMAT:
            raise ValueError
        return Manifest(**data)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(
            f"'{work}' holds an unfinished run, and is damaged or of another version of rrsq. Give --restart"
            " to throw it away and begin again."
        ) from error


def _kept_in(work: Path) -> str:
    return f"Finished layers are kept in '{work}'"


def _done_path(out: Path) -> Path:
    """The work folder's name while it is removed."""
    return work_path(out).with_suffix(".done")


def _put_back(work: Path, out: Path) -> None:
    """The old output, which a run that was to replace it moved here, if nothing took its place."""
    if (work / _REPLACED).exists() and not out.exists():
        (work / _REPLACED).rename(out)


def _empty(work: Path) -> None:
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
