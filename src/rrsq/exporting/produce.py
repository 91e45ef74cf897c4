"""From a checkpoint to one of compressed-tensors: the steps of ``rrsq export``, without a terminal."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..models import ModelFamily, family_for
from ..quantizer.production.output_shards import OutputShards, parse_size
from ..quantizer.production.source import empty_model
from ..runtime.format.format import CheckpointInfo
from ..runtime.format.integration import assemble_model
from ..runtime.format.json_files import read_config
from ..runtime.format.loading import load_config, read_info
from ..runtime.format.shards import TensorPlace, read_shards, shard_files
from ..runtime.format.validate import check_description, check_layers, check_shards, check_value
from ..storage import check_output, check_space, flush
from ..work_folder import WorkFolder
from .card import export_card
from .plan import ExportPlan, check_exportable, plan_export
from .schemes import quantization_config
from .tensors import export_linear, planned_linear, rounded

__all__ = ["ExportReport", "ExportStep", "export_checkpoint"]

ExportStep = Callable[[int, int, str], None]
"""Called with the modules written, the modules in all, and the name of the one that is next."""

# What is copied beside the weights: tokenizer, generation settings, chat template, licence.
_COPIED = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_OURS = {"config.json", "model.safetensors.index.json"}
_SIGNS = "rotation_signs"
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class ExportReport:
    """What came of an export.

    Attributes:
        bytes_before, bytes_after: of the tensors.
        dtype: of the scales and of what is not quantized.
        schemes: linears by how they are stored, in words.
        kept: linears in full precision.
        scale_error: largest relative error of a scale by rounding it to ``dtype``.
        dropped_cache: the checkpoint has a quantized KV cache, and the export has not.
    """

    bytes_before: int
    bytes_after: int
    dtype: str
    schemes: dict[str, int]
    kept: int
    scale_error: float
    dropped_cache: bool


@dataclass(frozen=True)
class _Source:
    """A checkpoint whose tensors are on the disk."""

    folder: Path
    info: CheckpointInfo
    family: ModelFamily
    model: Any
    places: dict[str, TensorPlace]
    plan: ExportPlan

    @classmethod
    def open(cls, folder: Path, *, drop_cache: bool) -> _Source:
        """What cannot be exported is refused as soon as it is known, of most by config.json alone."""
        info = read_info(folder)
        config = load_config(str(folder))
        check_description(config, info)
        family = family_for(config)
        check_exportable(info, family, drop_cache=drop_cache)
        check_layers(folder, config.get_text_config().num_hidden_layers)
        model = empty_model(config, config.dtype or torch.float32)
        with torch.device("meta"):
            assemble_model(model, info)
        plan = plan_export(model, info, family)
        check_shards(model, [str(file) for file in shard_files(folder)])
        return cls(folder, info, family, model, read_shards(folder), plan)

    def read(self, name: str) -> Tensor:
        tensor = self.places[name].read()
        check_value(name, tensor)
        return tensor


def export_checkpoint(
    checkpoint: Path,
    output: Path,
    *,
    dtype: str = "auto",
    drop_cache: bool = False,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    on_step: ExportStep = lambda done, total, text: None,
) -> ExportReport:
    """Write a checkpoint in the format of compressed-tensors; the output appears whole or not at all.

    Args:
        checkpoint: folder of a checkpoint of rrsq's.
        output: folder to write.
        dtype: of the scales and of what is not quantized: ``bfloat16``, ``float16``, ``float32``, or ``auto``
            for the checkpoint's own.
        drop_cache: export a checkpoint with a quantized KV cache without it.
        overwrite: replace ``output`` if it exists.
        max_shard_size: of one safetensors file, such as ``5GB``.
        on_step: told of progress.

    Raises:
        ModelLoadError, CheckpointError: the folder is no checkpoint, or a damaged one.
        ExportError: other engines have no place for what it holds.
        UsageError: the output exists, or is the checkpoint.
        StorageError: the disk is full, or the folder cannot be written.
    """
    shard_size = parse_size(max_shard_size)
    if _within(checkpoint, output) or _within(output, checkpoint):
        raise UsageError(f"'{output}' is not apart from the checkpoint '{checkpoint}'. Give another folder.")
    check_output(output, overwrite=overwrite)
    source = _Source.open(checkpoint, drop_cache=drop_cache)
    plan = source.plan
    kind = source.model.dtype if dtype == "auto" else _DTYPES[dtype]
    export = _Export(source, kind)
    identity = {"the checkpoint": str(checkpoint.absolute())}
    with WorkFolder.locked(output, "export", identity) as work:
        shards = OutputShards(work.staging, export.planned(), shard_size)
        check_space(output, shards.file_bytes, "the export takes")
        shutil.rmtree(work.staging, ignore_errors=True)
        work.staging.mkdir()
        shards.create()
        scale_error = export.write(shards, on_step)
        report = ExportReport(
            bytes_before=sum(place.size for place in source.places.values()),
            bytes_after=shards.tensor_bytes,
            dtype=str(kind).removeprefix("torch."),
            schemes=dict(Counter(scheme.describe() for scheme in plan.schemes.values())),
            kept=len(plan.kept),
            scale_error=scale_error,
            dropped_cache=plan.drops_cache,
        )
        export.write_beside(
            shards, quantization_config(plan.schemes, plan.kept, source.family.layers), report
        )
        flush(work.staging)
        work.finish()
        work.publish(overwrite=overwrite)
    return report


@dataclass(frozen=True)
class _Export:
    """One run: what is written, from what, in which dtype."""

    source: _Source
    dtype: torch.dtype

    def planned(self) -> dict[str, Tensor]:
        """The tensors of the export by name, on the meta device, in the order of the checkpoint's model."""
        planned: dict[str, Tensor] = {}
        for path, names in self._modules().items():
            scheme = self.source.plan.schemes.get(path)
            if scheme is not None:
                linear: Any = self.source.model.get_submodule(path)
                leaves = planned_linear(scheme, linear.out_features, linear.in_features, self.dtype)
                planned |= {f"{path}.{leaf}": tensor for leaf, tensor in leaves.items()}
            for name in names:
                if scheme is None or name == f"{path}.bias":
                    place = self.source.places[name]
                    planned[name] = torch.empty(place.shape, dtype=self.dtype, device="meta")
        return planned

    def _modules(self) -> dict[str, list[str]]:
        """The stored tensors that are exported, by their module's path."""
        found: dict[str, list[str]] = {}
        for name in self.source.model.state_dict():
            path, _, _ = name.rpartition(".")
            # A tied head is not stored; signs and what quantizes the cache are of no use elsewhere.
            if name in self.source.places and path != _SIGNS and "kv_quantizer" not in path.split("."):
                found.setdefault(path, []).append(name)
        return found

    def write(self, shards: OutputShards, on_step: ExportStep) -> float:
        """Convert and write module after module; returns the largest relative error of a scale."""
        modules = self._modules()
        worst = 0.0
        for done, (path, names) in enumerate(modules.items()):
            on_step(done, len(modules), path)
            scheme = self.source.plan.schemes.get(path)
            tensors = {name: self.source.read(name) for name in names}
            written: dict[str, Tensor] = {}
            if scheme is not None:
                stored = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
                linear = export_linear(path, scheme, stored, self.dtype)
                written = {f"{path}.{leaf}": tensor for leaf, tensor in linear.tensors.items()}
                worst = max(worst, linear.scale_error)
            for name, tensor in tensors.items():
                if scheme is None or name == f"{path}.bias":
                    written[name], _ = rounded(f"'{name}'", tensor, self.dtype)
            shards.write(written)
        on_step(len(modules), len(modules), "")
        return worst

    def write_beside(self, shards: OutputShards, quantization: dict[str, Any], report: ExportReport) -> None:
        """Configuration, index, model card, and what is copied as it is."""
        folder = shards.folder
        config = read_config(self.source.folder)
        config |= {"dtype": report.dtype, "quantization_config": quantization}
        _write_json(folder / "config.json", config)
        index = shards.index()
        if index is not None:
            _write_json(folder / "model.safetensors.index.json", index)
        for path in sorted(self.source.folder.iterdir()):
            if path.is_file() and path.suffix in _COPIED and path.name not in _OURS:
                shutil.copyfile(path, folder / path.name)
        (folder / "README.md").write_text(export_card(self.source.info, report), encoding="utf-8")


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _within(inner: Path, outer: Path) -> bool:
    return inner.resolve().is_relative_to(outer.resolve())
