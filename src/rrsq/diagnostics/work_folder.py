"""The folder in which a calibration run works: beside its output, kept when the run is stopped."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CalibrationError, StorageError
from ..quantizer.calibration.manifest import CalibrationManifest, read_manifest, write_manifest
from ..quantizer.calibration.stored import layer_file
from ..storage import flush, replace_folder, storage_errors

__all__ = ["finished_layers", "work_folder", "work_path"]

_LOCK = "lock"


def work_path(out: Path) -> Path:
    """Where the run that makes ``out`` works."""
    return out.absolute().parent / f".{out.absolute().name}.unfinished"


def finished_layers(folder: Path, layers: int) -> int:
    """How many of the layers have their file."""
    return sum(layer_file(folder, index).is_file() for index in range(layers))


@contextmanager
def work_folder(out: Path, manifest: CalibrationManifest) -> Iterator[Path]:
    """A folder to work in, which becomes ``out`` by a rename if the block ends well.

    What an earlier run of the same manifest left in it is kept; what another left is thrown away. If the
    block fails, the folder stays for the next run if a layer is finished.

    Raises:
        StorageError: another process is at work on the same output, or the disk cannot be written to.
    """
    work = work_path(out)
    with storage_errors(out, left=f"Finished layers are kept in '{work}'"):
        work.mkdir(exist_ok=True)
        with (work / _LOCK).open("w") as lock:
            try:
                # The system lets go of the lock when the process ends, however it ends.
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StorageError(
                    f"Another rrsq calibrate is writing '{out}' now. Wait for it, or choose another folder."
                ) from error
            if not _same(work, manifest):
                _empty(work)
                write_manifest(work, manifest)
            try:
                yield work
            except BaseException:
                if not finished_layers(work, manifest.layers):
                    shutil.rmtree(work, ignore_errors=True)
                raise
            (work / _LOCK).unlink()
            flush(work)
            replace_folder(work, out)


def _same(work: Path, manifest: CalibrationManifest) -> bool:
    try:
        return read_manifest(work) == manifest
    except CalibrationError:
        return False


def _empty(work: Path) -> None:
    for path in work.iterdir():
        if path.name == _LOCK:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            os.unlink(path)
