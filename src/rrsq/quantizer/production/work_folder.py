"""The folder beside OUT in which a quantization works, and from which the same command goes on after a stop.

It holds a lock, a manifest, the shards as far as they are filled, and the residual stream behind the last
finished layer. The manifest is written, by rename, after all that it speaks of is on the disk: at whatever
moment a process dies, the manifest and what it names fit each other.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import OutputExistsError, ResumeError, StorageError
from ..calibration.workers import ALONE, Workers
from .shard_files import raw_bytes, sync_folder

__all__ = ["Manifest", "WorkFolder", "was_published", "work_path"]

_FORMAT = 1
_LOCK, _MANIFEST, _STAGING, _REPLACED = "lock", "manifest.json", "out", "replaced"


@dataclass
class Manifest:
    """What a work folder holds.

    Attributes:
        identity: what the result depends on: the recipe, the model, the text and so on, as hashes or plain
            data by name. A run goes on only where all of it is the same.
        digests: SHA-256 (hex) of the tensors of each finished module, by its path.
        layers: the report of each finished layer; None before the embedding is finished.
        result: what the whole run did, once the output is whole.
    """

    identity: dict[str, Any]
    digests: dict[str, str] = field(default_factory=dict)
    layers: list[dict[str, Any]] | None = None
    result: dict[str, Any] | None = None

    @property
    def finished(self) -> int:
        """Finished layers."""
        return len(self.layers or ())


def work_path(out: Path) -> Path:
    """The work folder of an output."""
    return out.absolute().parent / f".{out.absolute().name}.work"


def _done_path(out: Path) -> Path:
    """The work folder's name while it is removed."""
    return work_path(out).with_suffix(".done")


def was_published(out: Path) -> bool:
    """Whether ``out`` is the result of a run that was stopped just before it removed its work folder."""
    work = work_path(out)
    manifest = _read(work / _MANIFEST)
    return manifest is not None and manifest.result is not None and not (work / _STAGING).exists()


class WorkFolder:
    """A work folder that this process has locked; made by :meth:`locked`."""

    def __init__(self, out: Path, manifest: Manifest) -> None:
        self.out = out.absolute()
        self.path = work_path(out)
        self.manifest = manifest

    @property
    def staging(self) -> Path:
        """The folder that becomes the output."""
        return self.path / _STAGING

    @classmethod
    @contextmanager
    def locked(
        cls, out: Path, identity: dict[str, Any], *, restart: bool = False, workers: Workers = ALONE
    ) -> Iterator[WorkFolder]:
        """Take the work folder of an output, with what an earlier run of the same identity left in it.

        It stays after a failure if a layer is finished, else it is removed.

        Args:
            out: the output.
            identity: see :class:`Manifest`.
            restart: throw away what an earlier run left.
            workers: the processes that work together; rank 0 has the lock, and the others read the manifest.

        Raises:
            ResumeError: an earlier run left finished layers and was not of this identity.
            StorageError: another process is at work on the same output.
        """
        work = work_path(out)
        if workers.rank != 0:
            workers.wait()
            yield cls(out, _read(work / _MANIFEST) or Manifest(identity))
            return
        with _lock(out):
            manifest = None if restart else _read(work / _MANIFEST)
            if manifest is not None and manifest.identity != identity and manifest.finished:
                raise _changed(manifest, identity, work)
            if manifest is None or manifest.identity != identity:
                manifest = Manifest(identity)
                _empty(work)
            folder = cls(out, manifest)
            try:
                folder.save()
                workers.wait()
                yield folder
            except BaseException:
                if not manifest.finished:
                    shutil.rmtree(work, ignore_errors=True)
                raise

    def save(self) -> None:
        """Have the manifest on the disk."""
        new = self.path / f"{_MANIFEST}.new"
        with new.open("w", encoding="utf-8") as file:
            json.dump({"format": _FORMAT, **vars(self.manifest)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.path / _MANIFEST)
        sync_folder(self.path)

    def write_stream(self, stream: Tensor, finished: int, rank: int) -> None:
        """Have the residual stream behind so many layers on the disk, beside the one before it."""
        with self._stream_file(finished, rank).open("wb") as file:
            file.write(raw_bytes(stream))
            file.flush()
            os.fsync(file.fileno())

    def read_stream(self, shape: tuple[int, ...], dtype: torch.dtype, rank: int) -> Tensor:
        """The residual stream behind the finished layers.

        Raises:
            StorageError: it is not there, or not whole.
        """
        path = self._stream_file(self.manifest.finished, rank)
        stream = torch.empty(shape, dtype=dtype)
        if not path.is_file() or path.stat().st_size != stream.nbytes:
            raise self.damaged()
        with path.open("rb") as file:
            file.readinto(raw_bytes(stream))
        return stream

    def remove_old_streams(self, rank: int) -> None:
        """Those that are not behind the last finished layer."""
        keep = self._stream_file(self.manifest.finished, rank)
        for path in self.path.glob(f"stream-{rank}-*.bin"):
            if path != keep:
                path.unlink()

    def damaged(self) -> StorageError:
        """The error for contents that are not what the manifest says."""
        return StorageError(
            f"'{self.path}', which holds an unfinished quantization, is damaged. Give --restart to throw its"
            f" {self.manifest.finished} finished layers away and begin again."
        )

    def publish(self, *, overwrite: bool) -> None:
        """Turn the staging folder into the output and remove the rest; may be repeated after a stop.

        The manifest says ``result`` by then and everything is on the disk.

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
                if replaced.exists() and not self.out.exists():
                    replaced.rename(self.out)
                raise
            sync_folder(self.out.parent)
        # By a rename again: as long as the folder is there, its manifest says that the output is whole.
        done = _done_path(self.out)
        shutil.rmtree(done, ignore_errors=True)
        self.path.rename(done)
        sync_folder(self.out.parent)
        shutil.rmtree(done, ignore_errors=True)

    def _stream_file(self, finished: int, rank: int) -> Path:
        return self.path / f"stream-{rank}-{finished}.bin"


@contextmanager
def _lock(out: Path) -> Iterator[None]:
    """Hold the lock of an output's work folder; the system lets go of it however the process ends."""
    work = work_path(out)
    shutil.rmtree(_done_path(out), ignore_errors=True)
    while True:
        work.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(work / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # Its owner removed the folder just now.
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise StorageError(
                f"Another process is making '{out}' now (it holds '{work / _LOCK}'). Wait for it, or choose"
                " another folder."
            ) from error
        # The owner before may have removed the file between opening and locking it.
        try:
            if os.stat(work / _LOCK).st_ino == os.fstat(descriptor).st_ino:
                break
        except FileNotFoundError:
            pass
        os.close(descriptor)
    try:
        yield
    finally:
        os.close(descriptor)


def _changed(manifest: Manifest, identity: dict[str, Any], work: Path) -> ResumeError:
    names = [name for name in identity if manifest.identity.get(name) != identity[name]]
    names += [name for name in manifest.identity if name not in identity]
    return ResumeError(
        f"'{work}' holds an unfinished quantization of {manifest.finished} layers, and since then"
        f" {' and '.join(names)} changed. Give the command of that run to go on with it, or --restart to"
        " throw it away."
    )


def _read(path: Path) -> Manifest | None:
    """A manifest, or None where there is none of this format."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.pop("format") != _FORMAT:
            return None
        return Manifest(**data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _empty(work: Path) -> None:
    for path in work.iterdir():
        if path.name != _LOCK:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
