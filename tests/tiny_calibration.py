"""Calibration folders of the tiny models, as several test files need them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiny_quantized import load_tiny, random_tokens, recipe_of

if TYPE_CHECKING:
    from torch import Tensor

    from rrsq.quantizer.calibration.stored import StoredCalibration

WINDOWS, LENGTH = 6, 64


def tiny_windows() -> Tensor:
    """The windows that the functions below run unless they are given others."""
    return random_tokens(WINDOWS, LENGTH, seed=1)


def calibrate_tiny(
    source: Path, folder: Path, recipe: str = "rrs-w4a4kv4", overrides: tuple[str, ...] = (), **options: Any
) -> StoredCalibration:
    """Calibrate the model of a folder; see :func:`calibrate_model`."""
    return calibrate_model(load_tiny(source), source.name, folder, recipe, overrides, **options)


def calibrate_model(
    model: Any,
    name: str,
    folder: Path,
    recipe: str = "rrs-w4a4kv4",
    overrides: tuple[str, ...] = (),
    *,
    hessians: bool = True,
    seed: int = 0,
    windows: Tensor | None = None,
) -> StoredCalibration:
    """Calibrate a model, which is used up, into ``folder``, without a report; layers there are kept."""
    from rrsq.diagnostics.layer_pass import calibrate_layers
    from rrsq.diagnostics.make_manifest import make_manifest
    from rrsq.quantizer.calibration.manifest import write_manifest
    from rrsq.quantizer.calibration.stored import StoredCalibration

    windows = tiny_windows() if windows is None else windows
    manifest = make_manifest(
        model,
        name,
        windows,
        recipe_of(recipe, overrides),
        source="random tokens",
        seed=seed,
        hessians=hessians,
    )
    folder.mkdir(exist_ok=True)
    write_manifest(folder, manifest)
    calibrate_layers(model, windows, manifest, folder)
    return StoredCalibration(folder)
