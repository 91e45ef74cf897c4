"""The manifest of a calibration run, from what it is about to do."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedArchitectureError
from ..models import ModelFamily, family_for
from ..quantizer.calibration.fingerprint import model_fingerprint
from ..quantizer.calibration.manifest import CalibrationManifest
from ..quantizer.calibration.windows import data_fingerprint
from ..recipe import Recipe
from ..storage import library_versions

__all__ = ["check_covered", "make_manifest"]


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
