"""Writing a checkpoint: into a sibling folder first, which becomes the output by one rename."""

from __future__ import annotations

import errno
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from ..errors import OutputExistsError, RRSQError, StorageError
from ..quantization.pipeline import QuantizedModel
from .card import model_card
from .format import CalibrationInfo, CheckpointInfo, RotationInfo

__all__ = ["check_output", "check_space", "checkpoint_info", "write_checkpoint"]

_VERSIONED = ("rrsq", "torch", "transformers", "safetensors", "tokenizers")


def check_output(out: Path, *, overwrite: bool) -> None:
    """Refuse an output that cannot be written before any work is done.

    Raises:
        OutputExistsError: ``out`` exists and ``overwrite`` is False, or is something rrsq did not make.
        StorageError: its parent cannot be written to.
    """
    if out.exists() or out.is_symlink():
        if not overwrite:
            raise OutputExistsError(
                f"'{out}' exists already. Give --overwrite to replace it, or another folder."
            )
        if not out.is_dir() or (any(out.iterdir()) and not (out / "config.json").is_file()):
            raise OutputExistsError(
                f"'{out}' is not a model folder; it is not replaced. Give another folder."
            )
    with _storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        probe = _staging(out)
        probe.mkdir()
        probe.rmdir()


def check_space(out: Path, needed: int) -> None:
    """Refuse a disk that cannot hold the checkpoint before hours are spent on it.

    Args:
        out: the output folder; its parent exists.
        needed: bytes it takes at least.

    Raises:
        StorageError: less is free.
    """
    free = shutil.disk_usage(out.absolute().parent).free
    if free < needed:
        raise StorageError(
            f"The disk of '{out}' has {free / 1e6:.0f} MB free and the checkpoint takes {needed / 1e6:.0f} MB"
            " at least. Free some space or choose another folder."
        )


def checkpoint_info(
    quantized: QuantizedModel, *, seed: int, source_model: str, calibration: CalibrationInfo | None
) -> CheckpointInfo:
    """What ``config.json`` says of a quantized model."""
    return CheckpointInfo(
        recipe=quantized.recipe,
        rotation=RotationInfo.model_validate(quantized.rotations.describe()),
        key_bits=tuple(quantized.key_bits),
        seed=seed,
        source_model=source_model,
        calibration=calibration,
        versions=_versions(),
        layer_snr_db=tuple(
            None if layer.output_snr_db is None else round(layer.output_snr_db, 2)
            for layer in quantized.report.layers
        ),
    )


def write_checkpoint(
    quantized: QuantizedModel,
    tokenizer: Any,
    info: CheckpointInfo,
    out: Path,
    *,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
) -> None:
    """Write a checkpoint; ``out`` appears whole, by rename, or not at all.

    Raises:
        OutputExistsError: ``out`` exists and ``overwrite`` is False.
        StorageError: the disk is full, or the target cannot be written to.
    """
    check_output(out, overwrite=overwrite)
    model: Any = quantized.model
    model.config.quantization_config = info.model_dump(mode="json")
    staging = _staging(out)
    _remove_abandoned(out)
    try:
        with _storage_errors(out):
            staging.mkdir()
            # The original's own format splits experts into matrices, which packed ones cannot be.
            model.save_pretrained(staging, max_shard_size=max_shard_size, save_original_format=False)
            tokenizer.save_pretrained(staging)
            (staging / "README.md").write_text(model_card(info, quantized.report), encoding="utf-8")
            _flush(staging)
            _replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _staging(out: Path) -> Path:
    return out.absolute().parent / f".{out.absolute().name}.partial-{os.getpid()}"


def _remove_abandoned(out: Path) -> None:
    """Remove staging folders of runs that were killed: those whose process is no more."""
    for folder in out.absolute().parent.glob(f".{glob.escape(out.absolute().name)}.partial-*"):
        number = folder.name.rsplit("-", 1)[-1]
        if number.isdigit() and not psutil.pid_exists(int(number)):
            shutil.rmtree(folder, ignore_errors=True)


def _replace(staging: Path, out: Path) -> None:
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


def _flush(folder: Path) -> None:
    """Have the files on the disk before the rename makes them the output."""
    for path in folder.rglob("*"):
        if not path.is_file():
            continue
        with path.open("rb+") as file:
            os.fsync(file.fileno())


@contextmanager
def _storage_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except RRSQError:
        raise
    except Exception as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise StorageError(
                f"The disk that holds '{out}' is full. Nothing was left there; free some space or choose"
                " another folder, and run the command again."
            ) from error
        if isinstance(error, OSError):
            raise StorageError(f"'{out}' cannot be written: {error.strerror or error}.") from error
        raise


def _versions() -> dict[str, str]:
    found = {}
    for name in _VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
