"""What is learned of activations: from text that runs through the model, from stored statistics, or nothing.

The three stand side by side: :class:`RunningText`, :class:`StoredStatistics`, :class:`Nothing`. The pipeline
asks whichever it has for what a layer's inputs look like, and tells it when the layer is done.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..models import LinearInput, ModelFamily
from ..recipe import Recipe
from ..runtime.kv_cache.rope import KeyRotary
from ..runtime.rotation.rotations import Rotations
from .calibration.basis import InputBasis, affine_of_head, affine_of_input
from .calibration.cache_statistics import collect_cache_means
from .calibration.experts import RoutedTokens, collect_routed_tokens
from .calibration.statistics import InputSummary, LayerStatistics
from .calibration.stored import StoredCalibration
from .calibration.stream import HiddenStates, collect_inputs
from .calibration.workers import ALONE, Workers
from .checks import check_activations
from .head import head_hessian
from .needs import needs_hessian, needs_order

__all__ = [
    "Activations",
    "MeasuredLayer",
    "Nothing",
    "RunningText",
    "StoredStatistics",
    "measure_layer",
    "stored_statistics",
]

Inputs = tuple[LinearInput, ...]

Step = Callable[[str], None]
"""Called with what is being done, once for each step of progress."""


@dataclass(frozen=True)
class MeasuredLayer:
    """What is known of a layer.

    Attributes:
        statistics: of its linear inputs, keys and values.
        routed: what its experts are called with; None without experts, or where the recipe does not ask.
        reference: its output for the first batch, in full precision; None without text.
    """

    statistics: LayerStatistics
    routed: RoutedTokens | None = None
    reference: Tensor | None = None


class Activations(Protocol):
    """Where a quantization learns of activations.

    Attributes:
        hidden: the text in front of the layer at hand, where text runs.
        steps: steps of progress of one layer.
    """

    hidden: HiddenStates | None
    steps: int

    def of_layer(
        self,
        index: int,
        layer: nn.Module,
        inputs: tuple[LinearInput, ...],
        rotary: KeyRotary | None,
        step: Step,
    ) -> MeasuredLayer:
        """What is known of a layer that is rotated and not yet quantized."""

    def advance(self, index: int, layer: nn.Module, reference: Tensor | None, step: Step) -> float | None:
        """The layer is quantized. Signal over error of its output in dB, where text runs through it."""

    def head_hessian(self, model: nn.Module) -> Tensor | None:
        """``Σ x xᵀ`` of the output head's input, float32 ``[hidden, hidden]``; None if it is not known."""


class Nothing:
    """No calibration: weights are rounded by themselves."""

    hidden: HiddenStates | None = None
    steps = 0

    def of_layer(
        self,
        index: int,
        layer: nn.Module,
        inputs: tuple[LinearInput, ...],
        rotary: KeyRotary | None,
        step: Step,
    ) -> MeasuredLayer:
        """See :class:`Activations`."""
        return MeasuredLayer(LayerStatistics({}, {}))

    def advance(self, index: int, layer: nn.Module, reference: Tensor | None, step: Step) -> float | None:
        """See :class:`Activations`."""
        return None

    def head_hessian(self, model: nn.Module) -> Tensor | None:
        """See :class:`Activations`."""
        return None


class StoredStatistics:
    """A folder of ``rrsq calibrate``, measured on the model in full precision."""

    hidden: HiddenStates | None = None
    steps = 0

    def __init__(
        self,
        stored: StoredCalibration,
        recipe: Recipe,
        family: ModelFamily,
        rotations: Rotations,
        device: torch.device,
    ) -> None:
        self.stored = stored
        self.recipe = recipe
        self.family = family
        self.rotations = replace(rotations, blocks=None)  # Those come when all is known of a layer.
        self.device = device

    def of_layer(
        self,
        index: int,
        layer: nn.Module,
        inputs: tuple[LinearInput, ...],
        rotary: KeyRotary | None,
        step: Step,
    ) -> MeasuredLayer:
        """See :class:`Activations`."""
        linears = tuple(entry for entry in inputs if not entry.experts)
        return MeasuredLayer(
            stored_statistics(
                self.stored, index, layer, linears, self.family, self.rotations, self.recipe, self.device
            )
        )

    def advance(self, index: int, layer: nn.Module, reference: Tensor | None, step: Step) -> float | None:
        """See :class:`Activations`."""
        return None

    def head_hessian(self, model: nn.Module) -> Tensor | None:
        """See :class:`Activations`."""
        basis = InputBasis.of_head(self.rotations, affine_of_head(model, self.family))
        return self.stored.head_hessian(basis, device=self.device)


class RunningText:
    """Text that runs through each layer twice: before it is quantized, to measure, and after, to go on.

    Args:
        hidden: the text in front of the first layer, or of the one behind those that are finished.
        recipe: what is to be done.
        family: of the model.
        device: where layers run.
        workers: the processes that share the text.
        before_overwrite: called with the index of a batch of ``hidden`` before it is overwritten.
    """

    def __init__(
        self,
        hidden: HiddenStates,
        recipe: Recipe,
        family: ModelFamily,
        device: torch.device,
        workers: Workers,
        before_overwrite: Callable[[int], None],
    ) -> None:
        self.hidden: HiddenStates | None = hidden
        self.text = hidden
        self.recipe = recipe
        self.family = family
        self.device = device
        self.workers = workers
        self.before_overwrite = before_overwrite
        self.steps = 2 * len(hidden.batches) + 1  # Each batch twice, once for adding up what was measured.

    def of_layer(
        self,
        index: int,
        layer: nn.Module,
        inputs: tuple[LinearInput, ...],
        rotary: KeyRotary | None,
        step: Step,
    ) -> MeasuredLayer:
        """See :class:`Activations`."""
        attention = layer.get_submodule(self.family.attention)
        return measure_layer(
            layer,
            inputs,
            attention,
            rotary,
            self.text,
            self.recipe,
            self.device,
            lambda: step("statistics"),
            self.workers,
        )

    def advance(self, index: int, layer: nn.Module, reference: Tensor | None, step: Step) -> float | None:
        """See :class:`Activations`."""
        assert reference is not None
        output = self.text.advance(layer, lambda: step("outputs"), self.before_overwrite)
        check_activations(output, f"Layer {index}, output")
        return _snr_db(reference, output)

    def head_hessian(self, model: nn.Module) -> Tensor | None:
        """See :class:`Activations`."""
        return head_hessian(model, self.family, self.text, self.device)


def measure_layer(
    layer: nn.Module,
    inputs: tuple[LinearInput, ...],
    attention: nn.Module,
    rotary: KeyRotary | None,
    hidden: HiddenStates,
    recipe: Recipe,
    device: torch.device,
    on_step: Callable[[], None],
    workers: Workers = ALONE,
) -> MeasuredLayer:
    """Run all text through a layer that is rotated and not yet quantized; the text stays where it is.

    With several workers each runs its own text, and the statistics of linears, keys and values are of all. Of
    what experts are called with, each keeps its own.
    ``on_step`` is called after each batch, and once they are added up.
    """
    linears = tuple(entry for entry in inputs if not entry.experts)
    mixture = tuple(entry for entry in inputs if entry.experts)
    with (
        collect_inputs(layer, linears, device, with_hessian=needs_hessian(recipe)) as found,
        _routed_tokens(layer, mixture, recipe) as routed,
        collect_cache_means(attention, rotary) as means,
    ):
        reference = hidden.observe(layer, on_step)
    workers.merge([*found.values(), *means.values()])
    if routed is not None:
        routed.merge(workers)
    on_step()
    statistics = LayerStatistics(
        {path: InputSummary(each.hessian, each.absmax) for path, each in found.items()},
        {name: each.mean() for name, each in means.items()},
    )
    return MeasuredLayer(statistics, routed, reference)


def stored_statistics(
    stored: StoredCalibration,
    index: int,
    layer: nn.Module,
    inputs: tuple[LinearInput, ...],
    family: ModelFamily,
    rotations: Rotations,
    recipe: Recipe,
    device: torch.device,
) -> LayerStatistics:
    """What a calibration folder holds of a layer that is rotated; its unfolded norms are as they were."""
    channels = stored.manifest.inputs
    bases = {
        entry: InputBasis.of_input(
            entry, channels[entry.name], rotations, affine_of_input(layer, entry, family)
        )
        for entry in inputs
    }
    return stored.layer(
        index,
        bases,
        rotations,
        device=device,
        with_hessian=needs_hessian(recipe),
        with_absmax=needs_order(recipe),
    )


def _routed_tokens(
    layer: nn.Module, mixture: tuple[LinearInput, ...], recipe: Recipe
) -> AbstractContextManager[RoutedTokens | None]:
    """Keeps what a layer's experts are called with, if there are any and the recipe asks for it."""
    if not mixture or not (needs_hessian(recipe) or needs_order(recipe)):
        return nullcontext()
    experts: Any = layer.get_submodule(mixture[0].parent)
    return collect_routed_tokens(experts)


def _snr_db(reference: Tensor, output: Tensor) -> float:
    noise = (output - reference).double().square().sum().clamp_min(1e-30)
    return float(10 * torch.log10(reference.double().square().sum().clamp_min(1e-30) / noise))
