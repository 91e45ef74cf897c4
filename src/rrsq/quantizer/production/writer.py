"""Writing a checkpoint: into a sibling folder first, which becomes the output by one rename."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ...runtime.format.format import CalibrationInfo, CheckpointInfo, RotationInfo
from ...storage import (
    check_output,
    flush,
    library_versions,
    remove_abandoned,
    replace_folder,
    staging_folder,
    storage_errors,
)
from ..pipeline import QuantizedModel
from .card import model_card
from .layout import ShardLayout

__all__ = ["checkpoint_info", "copy_processor", "write_beside", "write_checkpoint"]

# How a model that sees wants its images, and where they stand in the text.
_PROCESSOR = ("preprocessor_config.json", "processor_config.json")


def checkpoint_info(
    quantized: QuantizedModel, *, seed: int, source_model: str, calibration: CalibrationInfo | None
) -> CheckpointInfo:
    """What ``config.json`` says of a quantized model."""
    layers = quantized.report.layers
    return CheckpointInfo(
        recipe=quantized.recipe,
        rotation=RotationInfo.model_validate(quantized.rotations.describe()),
        key_bits=tuple(quantized.key_bits),
        seed=seed,
        source_model=source_model,
        calibration=calibration,
        versions=library_versions(),
        layer_snr_db=tuple(_rounded(layer.output_snr_db, 2) for layer in layers),
        weight_snr_db=tuple(
            {name: round(snr, 2) for name, snr in layer.weight_snr_db.items()} for layer in layers
        ),
        cache_error=tuple(_rounded(layer.cache_error, 4) for layer in layers),
    )


def _rounded(number: float | None, digits: int) -> float | None:
    return None if number is None else round(number, digits)


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
    staging = staging_folder(out)
    remove_abandoned(out)
    try:
        with storage_errors(out):
            staging.mkdir()
            # The original's own format splits experts into matrices, which packed ones cannot be.
            model.save_pretrained(staging, max_shard_size=max_shard_size, save_original_format=False)
            _write_text(quantized, tokenizer, info, staging)
            flush(staging)
            replace_folder(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_beside(
    quantized: QuantizedModel, tokenizer: Any, info: CheckpointInfo, folder: Path, layout: ShardLayout
) -> None:
    """Write all files of a checkpoint but its shards, which are in the folder already.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    model: Any = quantized.model
    model.config.quantization_config = info.model_dump(mode="json")
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    index = layout.index()
    if index is not None:
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    _write_text(quantized, tokenizer, info, folder)


def copy_processor(source: Path, folder: Path) -> None:
    """Copy what prepares images for a model, where it has such files."""
    for name in _PROCESSOR:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _write_text(quantized: QuantizedModel, tokenizer: Any, info: CheckpointInfo, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(model_card(info, quantized.report), encoding="utf-8")
