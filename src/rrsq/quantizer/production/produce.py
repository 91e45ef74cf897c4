"""From a model and a recipe to a checkpoint on disk: the steps of ``rrsq quantize``, without a terminal."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...errors import UsageError
from ...models import ModelFamily, family_for
from ...recipe import Recipe
from ...runtime.format.format import CalibrationInfo, CheckpointInfo, parse_info
from ...runtime.format.loading import load_config
from ...runtime.scheme import check_recipe
from ...storage import check_output, check_space, flush, library_versions
from ...work_folder import WorkFolder, was_published
from ..calibration.stored import StoredCalibration
from ..calibration.text import load_documents
from ..calibration.windows import BosChoice, calibration_windows, data_fingerprint, start_token
from ..calibration.workers import Workers
from ..checks import check_stored
from ..options import DEFAULTS, QuantizationOptions
from ..outcome import QuantizationReport
from ..pipeline import quantize_model
from ..projection import projected_memory
from .output_shards import OutputShards, parse_size, planned_tensors
from .source import NoteCallback, OpenedModel, empty_model, open_model
from .streaming import Progress, StreamingStore
from .writer import checkpoint_info, copy_processor, write_beside

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Calibration",
    "CalibrationText",
    "OutputOptions",
    "Produced",
    "SourceModel",
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
class SourceModel:
    """What is quantized.

    Attributes:
        path: Hub id, Hugging Face folder or ``.gguf`` file.
        tokenizer: the model's, written beside the weights.
        data_root: folder laid out like the Hub, looked in before it.
    """

    path: str
    tokenizer: PreTrainedTokenizerBase
    data_root: Path | None = None

    @property
    def name(self) -> str:
        """What a checkpoint says that it was made of."""
        return self.path.rstrip("/").rsplit("/", 1)[-1]


@dataclass(frozen=True)
class CalibrationText:
    """Which text to calibrate on, and how much of it."""

    source: str = "wikitext2"
    num_samples: int = 128
    sequence_length: int = 2048
    seed: int = 0
    """Of the windows' places."""
    bos: BosChoice = "auto"
    """Whether each window begins with the BOS token; ``auto``: if the model's family needs it."""


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

    @property
    def learned_from(self) -> Tensor | StoredCalibration | None:
        """What :func:`quantize_model` takes."""
        return self.windows if self.stored is None else self.stored


@dataclass(frozen=True)
class OutputOptions:
    """Where a checkpoint goes, and how.

    Attributes:
        folder: which appears whole or not at all.
        overwrite: replace it if it exists.
        max_shard_size: of one safetensors file.
        restart: throw away what an unfinished run of the same output left.
        offload: folder on a fast disk for calibration's activations; None keeps them in memory.
    """

    folder: Path
    overwrite: bool = False
    max_shard_size: str = "5GB"
    restart: bool = False
    offload: Path | None = None


@dataclass(frozen=True)
class Produced:
    """A checkpoint that was written: what it says of itself, and how its quantization went."""

    info: CheckpointInfo
    report: QuantizationReport


def check_source(model: str, data_root: Path | None = None, recipe: Recipe | None = None) -> ModelFamily:
    """Refuse a model that cannot be quantized before anything large is read; return its family.

    Args:
        model: Hub id, Hugging Face folder or ``.gguf`` file.
        data_root: folder laid out like the Hub, looked in before it.
        recipe: to be refused as well if the model is not made for it; None where there are several.

    Raises:
        RecipeError: a pattern of the recipe matches nothing, or else as :func:`check_recipe` says.
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
    if recipe is not None:
        check_recipe(recipe, family, empty_model(config, torch.bfloat16))
    return family


def load_calibration(
    tokenizer: PreTrainedTokenizerBase,
    family: ModelFamily,
    text: CalibrationText,
    data_root: Path | None = None,
) -> Calibration:
    """Fetch the calibration text and cut it into windows.

    Args:
        tokenizer: the model's.
        family: the model's, which may need a BOS token in each window.
        text: which, and how much of it.
        data_root: folder laid out like the Hub, looked in before it.

    Raises:
        UsageError: each window is to begin with a BOS token, and the tokenizer has none.
        DataError: it cannot be found or read, or is too short for one window.
    """
    start = start_token(tokenizer, text.bos, needed=family.needs_bos)
    documents = load_documents(text.source, split="train", data_root=data_root)
    windows = calibration_windows(
        tokenizer, documents, text.num_samples, text.sequence_length, text.seed, start
    )
    info = CalibrationInfo(
        source=text.source,
        num_samples=windows.shape[0],
        sequence_length=windows.shape[1],
        fingerprint=data_fingerprint(windows),
        bos_each_window=start is not None,
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
        bos_each_window=manifest.bos_each_window,
        stored=True,
    )
    return Calibration(None, info, stored)


def produce_checkpoint(
    source: SourceModel,
    recipe: Recipe,
    output: OutputOptions,
    calibration: Calibration | None,
    options: QuantizationOptions = DEFAULTS,
    *,
    on_step: StepCallback = lambda done, total, per_layer, text: None,
    on_note: NoteCallback = lambda text: None,
) -> Produced:
    """Quantize a model and write its checkpoint, which appears whole or not at all.

    Weights are read and written one decoder layer at a time. What is finished is kept beside the output
    (:class:`WorkFolder`) until the output is whole; the same call goes on from there after a stop.

    Args:
        source: the model.
        recipe: what to do.
        output: where to write.
        calibration: the windows or what was stored of them; None if the recipe needs none.
        options: how it is carried out; of several workers rank 0 writes.
        on_step: told of progress.
        on_note: told what a user may want to know.

    Raises:
        RRSQError: as :func:`open_model`, :func:`quantize_model` and :class:`WorkFolder` do.
    """
    if output.restart or not was_published(output.folder):
        check_output(output.folder, overwrite=output.overwrite)
    max_shard_size, workers = parse_size(output.max_shard_size), options.workers
    on_step(0, 0, 0, "reading the model")
    opened = open_model(source.path, source.data_root, on_note)
    stored = None if calibration is None else calibration.stored
    if stored is not None:
        stored.check_model(opened.fingerprint, source.path)
    identity = {
        "the recipe": recipe.model_dump(mode="json"),
        "the model": asdict(opened.fingerprint),
        "the calibration text": None if calibration is None else calibration.info.model_dump(mode="json"),
        "the seed": options.seed,
        "--max-shard-size": max_shard_size,
        "the kind of device": options.device,
        "the number of processes": workers.count,
        "the versions of the libraries": library_versions(),
    }
    with _work_folder(output, identity, workers) as work:
        if not work.manifest.whole:
            run = _Production(source, opened, recipe, output, calibration, options, work)
            run.execute(max_shard_size, on_step, on_note)
        workers.wait()
        made = Progress.of(work).result or {}
        if workers.rank == 0:
            work.publish(overwrite=output.overwrite)
    return Produced(parse_info(made["info"]), QuantizationReport.from_dict(made["report"]))


@contextmanager
def _work_folder(output: OutputOptions, identity: dict[str, Any], workers: Workers) -> Iterator[WorkFolder]:
    """The work folder, which rank 0 locks and the other processes read from."""
    if workers.rank != 0:
        workers.wait()
        with WorkFolder.shared(output.folder, "quantization", identity) as work:
            yield work
        return
    with WorkFolder.locked(output.folder, "quantization", identity, restart=output.restart) as work:
        workers.wait()
        yield work


@dataclass(frozen=True)
class _Production:
    """One run of :func:`produce_checkpoint` in its work folder."""

    source: SourceModel
    opened: OpenedModel
    recipe: Recipe
    output: OutputOptions
    calibration: Calibration | None
    options: QuantizationOptions
    work: WorkFolder

    def execute(self, max_shard_size: int, on_step: StepCallback, on_note: NoteCallback) -> None:
        """Quantize and fill the staging folder; the manifest's result says that it is done."""
        model, workers = self.opened.model, self.options.workers
        check_recipe(self.recipe, family_for(model.config), model)
        planned = planned_tensors(model.config, self.opened.dtype, self.recipe)
        shards = OutputShards(self.work.staging, planned, max_shard_size)
        if workers.rank == 0:
            self._prepare(shards, on_note)
        workers.wait()
        on_step(0, 0, 0, "quantizing")
        layers = model.config.get_text_config().num_hidden_layers
        with StreamingStore(
            model, self.opened.weights, shards, self.work, workers, self.output.offload
        ) as store:
            quantized = quantize_model(
                model,
                self.recipe,
                None if self.calibration is None else self.calibration.learned_from,
                self.options,
                store=store,
                progress=lambda done, total, text: on_step(done, total, total // layers, text),
            )
            progress = store.finish()
        info = checkpoint_info(
            quantized,
            seed=self.options.seed,
            source_model=self.source.name,
            calibration=None if self.calibration is None else self.calibration.info,
        )
        progress.result = {"info": info.model_dump(mode="json"), "report": quantized.report.to_dict()}
        progress.put(self.work)
        if workers.rank == 0:
            write_beside(quantized, self.source.tokenizer, info, shards)
            if self.opened.folder is not None:
                copy_processor(self.opened.folder, self.work.staging)
            flush(self.work.staging)
            self.work.finish()

    def _prepare(self, shards: OutputShards, on_note: NoteCallback) -> None:
        """Say what the run will need, and take the disk space for it."""
        config = self.opened.model.config
        windows = None if self.calibration is None else self.calibration.windows
        samples, tokens = (0, 0) if windows is None else windows.shape
        peak = projected_memory(
            self.opened.model, self.recipe, samples, tokens, offloaded=self.output.offload is not None
        )
        on_note(peak.describe(self.options.device))
        if Progress.of(self.work).layers is not None:
            layers = config.get_text_config().num_hidden_layers
            on_note(f"Going on from layer {self.work.manifest.finished + 1} of {layers}.")
            return
        check_space(self.output.folder, shards.file_bytes + 2 * peak.activations)
        shutil.rmtree(shards.folder, ignore_errors=True)
        shards.folder.mkdir()
        shards.create()
