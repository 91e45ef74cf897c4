"""Rotation in blocks of neighbouring channels, and their balance: between observing a layer and rounding it.

Balance needs to know the inputs, so that a layer is observed as it is; what was measured is then taken to the
basis in which the linears will read.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from ...models import LinearInput, ModelFamily
from ...runtime.modules.rotation import online_rotation
from ...runtime.rotation.rotations import Rotations
from ..calibration.experts import RoutedTokens
from ..calibration.hessian import SymmetricSum
from ..calibration.statistics import InputSummary, LayerStatistics
from .balance import balance_factors, balance_norms, balanced_norms, read_energy
from .online import rotate_input_online

__all__ = ["rotate_in_blocks"]


def rotate_in_blocks(
    layer: nn.Module,
    family: ModelFamily,
    rotations: Rotations,
    statistics: LayerStatistics,
    routed: RoutedTokens | None,
    *,
    balance: bool,
) -> LayerStatistics:
    """Balance the inputs behind norms and rotate all inputs online, in place.

    Args:
        layer: a decoder layer in floating point, its experts opened.
        family: of the model.
        rotations: with ``blocks``.
        statistics: of the layer as it is.
        routed: what its experts were called with; scaled in place with the norm in front of them.
        balance: whether channels are balanced; where nothing is known of an input they are not.

    Returns:
        The statistics of the inputs as the linears read them now.
    """
    factors: dict[str, Tensor] = {}
    if balance:
        known = {
            norm: (entries, _energy(entries, statistics, routed))
            for norm, entries in balanced_norms(layer, family).items()
        }
        wanted = {
            norm: balance_factors(read_energy(layer, entries), energy)
            for norm, (entries, energy) in known.items()
            if energy is not None
        }
        factors = balance_norms(layer, family, wanted)
    inputs = {}
    for entry in family.inputs_in(layer):
        factor = factors.get(entry.norm or "")
        if entry.experts:
            if factor is not None and routed is not None and entry.norm is not None:
                routed.scale(factor)
        elif entry.path in statistics.inputs:
            channels, _ = entry.shape(layer)
            inputs[entry.path] = _changed(
                statistics.inputs.pop(entry.path), entry, rotations, channels, factor
            )
        rotate_input_online(layer, entry, rotations)
    return replace(statistics, inputs=inputs)


def _energy(
    entries: tuple[LinearInput, ...], statistics: LayerStatistics, routed: RoutedTokens | None
) -> Tensor | None:
    """The mean square of each channel of a norm's output, up to a factor; None where it is not known.

    Behind a norm all tokens are of one length, but for its gain: none of them decides alone.
    """
    for entry in entries:
        summary = statistics.inputs.get(entry.path)
        if summary is not None and summary.hessian is not None:
            return summary.hessian.diagonal()
    if routed is not None and any(entry.experts for entry in entries):
        return routed.energy
    return None


def _changed(
    summary: InputSummary, entry: LinearInput, rotations: Rotations, channels: int, factor: Tensor | None
) -> InputSummary:
    """Statistics of ``x`` as those of ``(x * factor) @ R``."""
    if summary.hessian is None:
        return summary
    matrix = summary.hessian.matrix()
    if factor is not None:
        matrix = factor.unsqueeze(1) * matrix * factor
    rotation = online_rotation(entry, rotations, channels)
    if rotation is not None:
        matrix = rotation(rotation(matrix).t())
    return InputSummary(SymmetricSum.of(matrix), summary.absmax)
