"""One pass of calibration text through the full-precision model, layer by layer, into a folder.

Each layer is moved to the compute device in float32, its norms' gains are folded into its linears (the basis
of :mod:`rrsq.quantizer.calibration.basis`), and all text runs through it once. What was gathered is written
before the next layer's turn, so that a run that was stopped goes on where it was: finished layers only pass
the text on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NonFiniteError
from ..models import LinearInput, ModelFamily, family_for
from ..quantizer.calibration.basis import (
    InputBasis,
    affine_of_input,
    take_out_norm_of_head,
    take_out_norms,
    take_out_norms_of_embedding,
)
from ..quantizer.calibration.cache_statistics import collect_cache_means
from ..quantizer.calibration.manifest import CalibrationManifest
from ..quantizer.calibration.statistics import InputStatistics, MeanStatistics
from ..quantizer.calibration.stored import head_file, layer_file, write_tensors
from ..quantizer.calibration.stream import HiddenStates, collect_inputs
from ..quantizer.calibration.triangle import pack_symmetric
from ..quantizer.checks import check_finite
from ..quantizer.fold.balance import balance_factors, balanced_norms, read_energy
from ..quantizer.fold.rotations import fold_layer
from ..runtime.assemble import key_rotary
from ..runtime.modules.rotation import online_rotation
from ..runtime.rotation.rotations import make_rotations
from ..runtime.scheme import check_patterns, treatment
from .analysis import InputAnalysis, analyse_input
from .observe import ObservedInput

__all__ = ["calibrate_layers"]

Progress = Callable[[int, int, str], None]


def calibrate_layers(
    model: nn.Module,
    windows: Tensor,
    manifest: CalibrationManifest,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    progress: Progress = lambda done, total, text: None,
    on_layer: Callable[[int], None] = lambda finished: None,
) -> None:
    """Write the file of every layer that ``folder`` lacks.

    Args:
        model: in any floating dtype, on the CPU. It is used up: its layers are left empty, to make room.
        windows: int64 ``[samples, tokens]``.
        manifest: says whether Hessians are stored, and for which recipe and seed the analysis is made.
        folder: exists; its layer files are from an earlier run of the same manifest.
        device: where layers are computed.
        progress: called with steps done, steps in all, and what is being done.
        on_layer: called with the number of layers whose files are on the disk, when that is one more.

    Raises:
        NonFiniteError: a weight or an activation is NaN or Inf.
        RecipeError: a pattern of the recipe matches nothing.
        UnsupportedArchitectureError: no family is known for the model.
    """
    check_finite(model)
    check_patterns(manifest.recipe, family_for(model.config), model)
    _Run(model, windows, manifest, folder, torch.device(device), progress, on_layer).execute()


class _Run:
    """The state that the steps of one pass share."""

    def __init__(
        self,
        model: nn.Module,
        windows: Tensor,
        manifest: CalibrationManifest,
        folder: Path,
        device: torch.device,
        progress: Progress,
        on_layer: Callable[[int], None],
    ) -> None:
        config: Any = model.config
        self.manifest = manifest
        self.folder = folder
        self.device = device
        self.progress = progress
        self.on_layer = on_layer
        self.family: ModelFamily = family_for(config)
        self.sizes = self.family.sizes(config)
        self.rotations = make_rotations(
            manifest.recipe.rotation, self.sizes, manifest.seed, folds_residual=self.family.folds_residual
        )
        self.model = model.eval().requires_grad_(False)
        self.layers: Any = model.get_submodule(self.family.layers)
        take_out_norms_of_embedding(model, self.family, self.sizes)
        self.hidden = HiddenStates(model, self.family, windows, device)
        self.steps_a_layer = len(self.hidden.batches) + len(manifest.inputs)
        self.steps = 0

    def execute(self) -> None:
        for index, layer in enumerate(self.layers):
            name = f"layer {index + 1}/{len(self.layers)}"
            layer.to(device=self.device, dtype=torch.float32)
            if layer_file(self.folder, index).is_file():
                take_out_norms(layer, self.family, self.sizes)
                self.hidden.advance(layer, partial(self._step, f"{name}: done before"))
                self.steps = (index + 1) * self.steps_a_layer
            else:
                self._measure(index, layer, name)
                self.on_layer(index + 1)
            layer.to("meta")
        if self.manifest.hessians and not head_file(self.folder).is_file():
            self._measure_head()

    def _measure(self, index: int, layer: nn.Module, name: str) -> None:
        inputs = self.family.inputs_in(layer)
        affine = {entry: affine_of_input(layer, entry, self.family) for entry in inputs}
        read = self._read_energies(layer)
        folded = copy.deepcopy(layer)
        if self.manifest.recipe.rotation is not None:
            fold_layer(folded, self.family, self.rotations, self.sizes)
        take_out_norms(layer, self.family, self.sizes)
        observed: dict[LinearInput, ObservedInput] = {}

        def create(entry: LinearInput, channels: int) -> ObservedInput:
            basis = InputBasis.of_input(entry, channels, self.rotations, affine[entry])
            observed[entry] = ObservedInput(
                channels,
                self.device,
                basis,
                affine[entry],
                self.manifest.sequence_length,
                with_hessian=self.manifest.hessians,
            )
            return observed[entry]

        attention = layer.get_submodule(self.family.attention)
        with (
            collect_inputs(layer, inputs, self.device, with_hessian=True, create=create),
            collect_cache_means(attention, key_rotary(self.model, self.family, index)) as means,
        ):
            self.hidden.advance(layer, partial(self._step, f"{name}: statistics"))
        tensors = {f"mean.{key}": value.mean() for key, value in means.items()}
        numbers: dict[str, Any] = {}
        for entry in inputs:
            gathered = observed.pop(entry)
            _check_activations(gathered, index, entry)
            how = treatment(self.manifest.recipe, self.family.layer_name(index), entry)
            with torch.inference_mode():
                weight = _stacked_weight(folded, entry, how.linears or entry.linears)
                if self.rotations.blocks is not None:
                    weight = self._in_blocks(gathered, weight, entry, read.get(entry.norm or ""))
                analysis = analyse_input(gathered, weight, entry, how)
            tensors.update(_tensors(entry.name, gathered, analysis, self.manifest.tokens))
            numbers[entry.name] = _numbers(analysis)
            self._step(f"{name}: outliers and errors")
        write_tensors(layer_file(self.folder, index), tensors, numbers)

    def _read_energies(self, layer: nn.Module) -> dict[str, Tensor]:
        """What the linears behind each norm read of its channels, where the recipe balances them."""
        rotation = self.manifest.recipe.rotation
        if rotation is None or not rotation.balance:
            return {}
        norms = balanced_norms(layer, self.family)
        return {norm: read_energy(layer, entries) for norm, entries in norms.items()}

    def _in_blocks(
        self, observed: ObservedInput, weight: Tensor, entry: LinearInput, read: Tensor | None
    ) -> Tensor:
        """A weight behind balance and rotation in blocks; the basis of ``observed`` is balanced too."""
        if read is not None:
            mean, square = (x / self.manifest.tokens for x in (observed.sums, observed.squares))
            factors = balance_factors(read, observed.basis.energy(mean, square)).to(weight.device)
            observed.basis = observed.basis.balanced(factors)
            weight = weight / factors
        rotation = online_rotation(entry, self.rotations, weight.shape[1])
        return weight if rotation is None else rotation(weight)

    def _measure_head(self) -> None:
        """The Hessian of the output head's input, of the text behind all layers."""
        norm = take_out_norm_of_head(self.model, self.family, self.sizes).to(self.device, torch.float32)
        statistics, means = InputStatistics(self.sizes.hidden, self.device), MeanStatistics()
        with torch.inference_mode():
            for batch in self.hidden.batches:
                x = norm(batch.to(self.device))
                statistics.add(x)
                means.add(x)
        assert statistics.hessian is not None
        tensors = {"hessian": pack_symmetric(statistics.hessian.matrix()), "mean": means.mean()}
        write_tensors(head_file(self.folder), tensors, {})

    def _step(self, text: str) -> None:
        self.steps += 1
        self.progress(self.steps, self.steps_a_layer * len(self.layers), text)


def _stacked_weight(layer: nn.Module, entry: LinearInput, linears: tuple[str, ...]) -> Tensor:
    """The weights ``[out, in]`` of some linears of one input, one below the other."""
    parent: Any = layer.get_submodule(entry.parent)
    return torch.cat([getattr(parent, name).weight.detach() for name in linears])


def _check_activations(observed: ObservedInput, index: int, entry: LinearInput) -> None:
    if not bool(torch.isfinite(observed.squares).all()):
        raise NonFiniteError(
            f"Layer {index}, input '{entry.name}': the activations hold NaN or Inf although the weights do"
            " not. The model overflows float32 on this text; try another text."
        )


def _tensors(name: str, observed: ObservedInput, analysis: InputAnalysis, tokens: int) -> dict[str, Tensor]:
    """What a layer's file holds of one input."""
    tensors = {
        f"{name}.absmax": observed.absmax_rotated,
        f"{name}.mean": (observed.sums / tokens).float(),
        f"{name}.rms": (observed.squares / tokens).sqrt().float(),
        f"{name}.report.channel_absmax": analysis.channel_absmax,
        f"{name}.report.token_absmax": analysis.token_absmax,
        f"{name}.report.magnitudes": analysis.magnitudes,
    }
    if observed.hessian is not None:
        tensors[f"{name}.hessian"] = pack_symmetric(observed.hessian.matrix())
    return tensors


def _numbers(analysis: InputAnalysis) -> dict[str, Any]:
    """The analysis without its tensors."""
    return {key: value for key, value in asdict(analysis).items() if not isinstance(value, Tensor)}
