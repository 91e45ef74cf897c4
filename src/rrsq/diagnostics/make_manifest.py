"""What a calibration run is about to do: as a manifest, and as a work folder to do it in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedArchitectureError
from ..models import ModelFamily, family_for
from ..quantizer.calibration.fingerprint import model_fingerprint
from ..quantizer.calibration.manifest import CalibrationManifest, write_manifest
from ..quantizer.calibration.stored import layer_file
from ..quantizer.calibration.windows import data_fingerprint
from ..recipe import Recipe
from ..storage import library_versions
from ..work_folder import WorkFolder

__all__ = ["calibration_work", "check_covered", "make_manifest"]


def check_covered(family: ModelFamily) -> None:
    """Refuse a mixture of experts: their inputs are as many as experts, and their Hessians would fill disks.

    Raises:
        UnsupportedArchitectureError: the family's layers may have experts.
    """
    if any(entry.experts for entry in family.inputs):
        raise UnsupportedArchitectureError(
            f"rrsq calibrate does not cover mixtures of experts such as {family.model_type}. rrsq quantize"
            " does, on text."
        )


def make_manifest(
    model: nn.Module,
    name: str,
    windows: Tensor,
    recipe: Recipe,
    *,
    source: str,
    bos_each_window: bool = False,
    seed: int,
    hessians: bool,
) -> CalibrationManifest:
    """The manifest of a run on a model as it was loaded.

    Args:
        model: nothing has changed its weights yet.
        name: of the model.
        windows: int64 ``[samples, tokens]``.
        recipe: of the report.
        source: data set or file of the text.
        bos_each_window: each window begins with the BOS token.
        seed: of the windows and the rotations.
        hessians: whether they are stored.
    """
    config: Any = model.config
    family = family_for(config)
    layers: Any = model.get_submodule(family.layers)
    check_covered(family)
    fingerprint = model_fingerprint(model)
    return CalibrationManifest(
        source_model=name,
        config_fingerprint=fingerprint.config,
        weights_fingerprint=fingerprint.weights,
        data_source=source,
        data_fingerprint=data_fingerprint(windows),
        num_samples=windows.shape[0],
        sequence_length=windows.shape[1],
        bos_each_window=bos_each_window,
        seed=seed,
        recipe=recipe,
        hessians=hessians,
        layers=len(layers),
        inputs={
            entry.name: layers[0].get_submodule(entry.linear_paths[0]).weight.shape[1]
            for entry in family.inputs_in(layers[0])
        },
        versions=library_versions(),
    )


@contextmanager
def calibration_work(
    out: Path, manifest: CalibrationManifest, *, restart: bool = False
) -> Iterator[WorkFolder]:
    """The work folder of a run, its staging folder with the layers that are finished.

    Raises:
        RRSQError: as :meth:`WorkFolder.locked` does.
    """
    plain = manifest.model_dump(mode="json")
    text = ("data_source", "data_fingerprint", "num_samples", "sequence_length", "bos_each_window")
    identity = {
        "the recipe": plain["recipe"],
        "the model": [manifest.config_fingerprint, manifest.weights_fingerprint],
        "the calibration text": [plain[name] for name in text],
        "the seed": manifest.seed,
        "--hessians": manifest.hessians,
        "the versions of the libraries": manifest.versions,
    }
    with WorkFolder.locked(out, "calibration", identity, restart=restart) as work:
        if not work.manifest.whole:
            work.staging.mkdir(exist_ok=True)
            write_manifest(work.staging, manifest)
        if not all(layer_file(work.made, index).is_file() for index in range(work.manifest.finished)):
            raise work.damaged()
        yield work
