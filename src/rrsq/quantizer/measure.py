"""The statistics of one rotated layer before its weights are quantized: measured on text, or stored."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models import LinearInput, ModelFamily
from ..recipe import Recipe
from ..runtime.kv_cache.rope import KeyRotary
from ..runtime.rotation.rotations import Rotations
from .calibration.basis import InputBasis, affine_of_input
from .calibration.experts import RoutedTokens, collect_routed_tokens
from .calibration.statistics import InputSummary, LayerStatistics
from .calibration.stored import StoredCalibration
from .calibration.stream import HiddenStates, collect_cache_means, collect_inputs
from .calibration.workers import ALONE, Workers
from .needs import needs_hessian, needs_order

__all__ = ["MeasuredLayer", "measure_layer", "stored_statistics"]


@dataclass(frozen=True)
class MeasuredLayer:
    """What was measured of a layer.

    Attributes:
        statistics: of its linear inputs, keys and values.
        routed: what its experts are called with; None without experts, or where the recipe does not ask.
        reference: its output for the first batch, in full precision.
    """

    statistics: LayerStatistics
    routed: RoutedTokens | None
    reference: Tensor


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

    With several workers each runs its own text, and the statistics of linears, keys and values are of all.
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
