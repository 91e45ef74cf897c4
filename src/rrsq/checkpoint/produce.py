"""From a model and a recipe to a checkpoint on disk: the steps of ``rrsq quantize``, without a terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..calibration.fingerprint import model_fingerprint
from ..calibration.stored import StoredCalibration
from ..calibration.text import load_documents
from ..calibration.windows import calibration_windows, data_fingerprint
from ..errors import UsageError
from ..models import ModelFamily, family_for
from ..quantization.checks import check_stored
from ..quantization.memory import least_checkpoint_bytes
from ..quantization.pipeline import quantize_model
from ..quantization.report import QuantizationReport
from ..recipe import Recipe
from ..storage import check_output, check_space
from .format import CalibrationInfo, CheckpointInfo
from .loading import load_config, load_model
from .writer import checkpoint_info, write_checkpoint

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Calibration",
    "CalibrationText",
    "OutputOptions",
    "Produced",
    "StepCallback",
    "check_source",
    "load_calibration",
    "open_calibration",
    "produce_checkpoint",
]

StepCallback = Callable[[int, int, int, str], None]
"""Called with the steps done, the steps in all, the steps of one decoder layer, and what is being done.

The totals are 0 while they are not known: before the first layer and while the checkpoint is written.
"""


@dataclass(frozen=True)
class CalibrationText:
    """Which text to calibrate on, and how much of it."""

    source: str = "wikitext2"
    num_samples: int = 128
    sequence_length: int = 2048
    seed: int = 0
    """Of the windows' places."""


@dataclass(frozen=True)
class Calibration:
    """What a model is calibrated on.

    Attributes:
        windows: int64 ``[samples, tokens]``; None with ``stored``.
        info: what a checkpoint says of it.
        stored: statistics to use in place of windows, or None.
    """

    windows: Tensor | None
    info: CalibrationInfo
    stored: StoredCalibration | None = None


@dataclass(frozen=True)
class OutputOptions:
    """Where a checkpoint goes, and how."""

    folder: Path
    overwrite: bool = False
    max_shard_size: str = "5GB"


@dataclass(frozen=True)
class Produced:
    """A checkpoint that was written: what it says of itself, and how its quantization went."""

    info: CheckpointInfo
    report: QuantizationReport


def check_source(model: str, data_root: Path | None = None) -> ModelFamily:
    """Refuse a model that cannot be quantized before anything large is read; return its family.

    Raises:
        ModelLoadError: there is no such model.
        UnsupportedArchitectureError: no family is known for it.
        UsageError: it is quantized already.
    """
    config = load_config(model, data_root)
    family = family_for(config)
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    if method is not None and not model.endswith(".gguf"):
        raise UsageError(
            f"'{model}' is quantized already ({method}). Quantize the original model, in 16 or 32 bits."
        )
    return family


def load_calibration(
    tokenizer: PreTrainedTokenizerBase, text: CalibrationText, data_root: Path | None = None
) -> Calibration:
    """Fetch the calibration text and cut it into windows.

    Raises:
        DataError: it cannot be found or read, or is too short for one window.
    """
    documents = load_documents(text.source, split="train", data_root=data_root)
    windows = calibration_windows(tokenizer, documents, text.num_samples, text.sequence_length, text.seed)
    info = CalibrationInfo(
        source=text.source,
        num_samples=windows.shape[0],
        sequence_length=windows.shape[1],
        fingerprint=data_fingerprint(windows),
    )
    return Calibration(windows, info)


def open_calibration(folder: Path, recipe: Recipe, seed: int) -> Calibration:
    """Use the statistics of a folder of ``rrsq calibrate`` in place of text.

    Args:
        folder: that ``rrsq calibrate`` wrote.
        recipe: to be applied.
        seed: of the rotations' random signs.

    Raises:
        CalibrationError: it is no such folder, or lacks what the recipe needs.
    """
    stored = StoredCalibration(folder)
    check_stored(stored, recipe, seed)
    manifest = stored.manifest
    info = CalibrationInfo(
        source=manifest.data_source,
        num_samples=manifest.num_samples,
        sequence_length=manifest.sequence_length,
        fingerprint=manifest.data_fingerprint,
        stored=True,
    )
    return Calibration(None, info, stored)


def produce_checkpoint(
    model: str,
    recipe: Recipe,
    output: OutputOptions,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Calibration | None,
    *,
    seed: int = 0,
    device: str = "cpu",
    data_root: Path | None = None,
    on_step: StepCallback = lambda done, total, per_layer, text: None,
) -> Produced:
    """Quantize a model and write its checkpoint, which appears whole or not at all.

    Args:
        model: Hub id, Hugging Face folder or ``.gguf`` file.
        recipe: what to do.
        output: where to write.
        tokenizer: the model's, written beside the weights.
        calibration: the windows or what was stored of them; None if the recipe needs none.
        seed: of the rotations' random signs.
        device: where layers are computed.
        data_root: folder laid out like the Hub, looked in before it.
        on_step: told of progress.

    Raises:
        RRSQError: as :func:`load_model`, :func:`quantize_model` and :func:`write_checkpoint` do.
    """
    check_output(output.folder, overwrite=output.overwrite)
    on_step(0, 0, 0, "loading the model")
    loaded = load_model(model, device="cpu", data_root=data_root)
    stored = None if calibration is None else calibration.stored
    if stored is not None:
        stored.check_model(model_fingerprint(loaded), model)
    check_space(output.folder, least_checkpoint_bytes(loaded, recipe))
    layers = loaded.config.get_text_config().num_hidden_layers
    quantized = quantize_model(
        loaded,
        recipe,
        None if calibration is None else calibration.windows,
        stored=stored,
        seed=seed,
        device=device,
        progress=lambda done, total, text: on_step(done, total, total // layers, text),
    )
    on_step(0, 0, 0, "writing the checkpoint")
    info = checkpoint_info(
        quantized,
        seed=seed,
        source_model=model.rstrip("/").rsplit("/", 1)[-1],
        calibration=None if calibration is None else calibration.info,
    )
    write_checkpoint(
        quantized,
        tokenizer,
        info,
        output.folder,
        overwrite=output.overwrite,
        max_shard_size=output.max_shard_size,
    )
    return Produced(info, quantized.report)
