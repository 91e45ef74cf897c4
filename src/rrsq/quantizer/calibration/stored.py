"""Statistics of a calibration folder, in the place of those that a quantization run would measure."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...errors import CalibrationError
from ...models import LinearInput
from ...recipe import Rotation
from ...runtime.rotation.rotations import Rotations
from ...storage import sync_folder
from .basis import InputBasis
from .cache_statistics import CACHE_MEANS
from .fingerprint import ModelFingerprint
from .hessian import SymmetricSum
from .manifest import CalibrationManifest, read_manifest
from .statistics import InputSummary, LayerStatistics
from .triangle import packed_size, unpack_symmetric

__all__ = ["StoredCalibration", "head_file", "layer_file", "write_tensors"]


def layer_file(folder: Path, index: int) -> Path:
    """The file of one layer."""
    return folder / f"layer-{index:04d}.safetensors"


def head_file(folder: Path) -> Path:
    """The file of the output head."""
    return folder / "head.safetensors"


def write_tensors(path: Path, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Write a file of the folder, whole or not at all; ``numbers`` is plain data for its header."""
    partial = path.with_suffix(".partial")
    plain = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    save_file(plain, partial, {"rrsq": json.dumps(numbers)})
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.rename(path)
    sync_folder(path.parent)


class StoredCalibration:
    """A folder that ``rrsq calibrate`` wrote.

    Args:
        folder: where it is.

    Raises:
        CalibrationError: it is no calibration folder, or a file of it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: CalibrationManifest = read_manifest(folder)
        files = [layer_file(folder, index) for index in range(self.manifest.layers)]
        for path in [*files, head_file(folder)] if self.manifest.hessians else files:
            if not path.is_file():
                raise CalibrationError(f"'{folder}' lacks {path.name}. It may not have been copied whole.")

    def check_model(self, fingerprint: ModelFingerprint, model: str) -> None:
        """Refuse another model; ``model`` names it in the :class:`CalibrationError`."""
        made_from = ModelFingerprint(self.manifest.config_fingerprint, self.manifest.weights_fingerprint)
        if fingerprint == made_from:
            return
        same_config = fingerprint.config == made_from.config
        raise CalibrationError(
            f"'{self.folder}' was made from another model: '{self.manifest.source_model}' and '{model}'"
            f" differ in their {'weights' if same_config else 'configurations'}. Run rrsq calibrate on"
            f" '{model}'."
        )

    def holds_magnitudes(self, rotation: Rotation | None, seed: int) -> bool:
        """Whether the largest magnitudes of channels are those of a recipe's rotations."""
        manifest = self.manifest
        return manifest.recipe.rotation == rotation and (rotation is None or manifest.seed == seed)

    def layer(
        self,
        index: int,
        bases: dict[LinearInput, InputBasis],
        rotations: Rotations,
        *,
        device: torch.device,
        with_hessian: bool,
        with_absmax: bool,
    ) -> LayerStatistics:
        """The statistics of one layer as a recipe's rotations make them.

        Args:
            index: of the layer.
            bases: of its inputs.
            rotations: the recipe's.
            device: where the tensors are put.
            with_hessian: False leaves the Hessians out.
            with_absmax: False leaves the magnitudes out; see :meth:`holds_magnitudes`.

        Raises:
            CalibrationError: the file is damaged.
        """
        inputs: dict[str, InputSummary] = {}
        with self._opened(layer_file(self.folder, index)) as file:
            for entry, basis in bases.items():
                channels, name = self.manifest.inputs[entry.name], entry.name
                hessian = absmax = None
                if with_hessian:
                    hessian = SymmetricSum.of(self._hessian(file, f"{name}.", channels, basis, device))
                if with_absmax:
                    absmax = _read(file, f"{name}.absmax", channels).to(device)
                inputs[entry.path] = InputSummary(hessian, absmax)
            held = set(file.keys())
            names = [n for n in CACHE_MEANS if n != "query_square" or f"mean.{n}" in held]
            means = {name: file.get_tensor(f"mean.{name}") for name in names}
        if rotations.head is not None:
            means["value"] = rotations.head.apply(means["value"])
        return LayerStatistics(inputs, means)

    def head_hessian(self, basis: InputBasis, *, device: torch.device) -> Tensor:
        """``Σ x xᵀ`` of the output head's input, float32 ``[hidden, hidden]``.

        Raises:
            CalibrationError: the file is damaged.
        """
        with self._opened(head_file(self.folder)) as file:
            return self._hessian(file, "", file.get_tensor("mean").numel(), basis, device)

    def _hessian(
        self, file: Any, prefix: str, channels: int, basis: InputBasis, device: torch.device
    ) -> Tensor:
        packed = _read(file, f"{prefix}hessian", packed_size(channels))
        mean = _read(file, f"{prefix}mean", channels).to(device)
        return basis.hessian(unpack_symmetric(packed, channels).to(device), mean, self.manifest.tokens)

    def numbers(self, index: int) -> dict[str, Any]:
        """The plain data of a layer's header."""
        with self._opened(layer_file(self.folder, index)) as tensors:
            return json.loads(tensors.metadata()["rrsq"])

    def tensor(self, index: int, name: str) -> Tensor:
        """One tensor of a layer's file."""
        with self._opened(layer_file(self.folder, index)) as tensors:
            return tensors.get_tensor(name)

    @contextmanager
    def _opened(self, path: Path) -> Iterator[Any]:
        try:
            with safe_open(path, framework="pt") as tensors:
                yield tensors
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
            raise CalibrationError(f"{path} is damaged: {reason}. Run rrsq calibrate again.") from error


def _read(file: Any, name: str, size: int) -> Tensor:
    """A vector of this size."""
    tensor: Tensor = file.get_tensor(name)
    if tuple(tensor.shape) != (size,):
        raise SafetensorError(f"'{name}' has shape {tuple(tensor.shape)}, not ({size},)")
    return tensor
