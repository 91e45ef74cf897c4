"""The outliers of one linear input, and what a recipe's quantization does to the linears that read it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from ..models import LinearInput
from ..quantizer.weights import quantize_weight
from ..recipe import Weights
from ..runtime.modules.input import InputQuantizer, InputScheme
from ..runtime.scheme import Treatment, input_scheme
from .observe import ObservedInput
from .smoothing import smooth

__all__ = ["MAP_CHANNELS", "MAP_TOKENS", "STAGES", "InputAnalysis", "analyse_input"]

STAGES = ("original", "rotated", "smoothed")
MAP_TOKENS, MAP_CHANNELS = 64, 128
_SPIKES = 3
_TINY = 1e-30


@dataclass(frozen=True)
class InputAnalysis:
    """One linear input at the three :data:`STAGES`: as the network has it, rotated, and smoothed as well.

    Attributes:
        ratio: by stage, the largest magnitude of a token over its root mean square, mean over tokens.
        output_error: ``‖Δy‖ / ‖y‖`` of the linears' outputs over all tokens of the sample, with activations
            quantized as the recipe says and weights rounded to nearest on its grid.
        activation_error, weight_error: the same with only the one or the other quantized.
        token_error: ``‖Δy‖ / ‖y‖`` of each token by itself, median over the sample. Spike tokens have large
            outputs and decide :attr:`output_error`; this is what happens to the others.
        spikes: of the calibration tokens with the largest magnitudes: window, position, magnitude.
        median_magnitude: the largest magnitude of a token, median over all calibration tokens.
        channel_absmax: float32 ``[3, channels]``, largest magnitude of a channel over the sample, in units of
            the root mean square of the stage's median token.
        token_absmax: float32 ``[3, tokens]``, of a token of the first window, in the same units.
        magnitudes: float32 ``[3, up to 64, up to 128]``, ``|x|`` of the first window in the same units, the
            largest of each cell of tokens and channels.
    """

    ratio: dict[str, float]
    output_error: float
    activation_error: float
    weight_error: float
    token_error: float
    spikes: list[tuple[int, int, float]]
    median_magnitude: float
    channel_absmax: Tensor
    token_absmax: Tensor
    magnitudes: Tensor


def analyse_input(
    observed: ObservedInput, weight: Tensor, entry: LinearInput, how: Treatment
) -> InputAnalysis:
    """Analyse a linear input on the sample that was observed of it.

    Args:
        observed: with at least one batch.
        weight: float32 ``[out, in]``, stacked, of the linears that the recipe quantizes, as it folds its
            rotations into them; of all linears where it quantizes none.
        entry: the input.
        how: how activations are smoothed and quantized and on which grid weights are rounded.
    """
    assert observed.sample is not None
    channels = weight.shape[1]
    scheme = input_scheme(how.activations, entry, channels) if how.linears else InputScheme(channels)
    quantizer = InputQuantizer(scheme).to(weight.device)
    if quantizer.channel_order is not None:
        quantizer.channel_order.copy_(observed.absmax_rotated.argsort(stable=True))
    rounded = weight
    if how.linears:
        rounded = _rounded_to_nearest(weight, how.weights, quantizer.channel_order)
    errors = _Errors()
    stages: list[list[Tensor]] = []
    for window in observed.sample:
        rotated = observed.basis.rows(window)
        order = rotated.abs().amax(0).argsort() if scheme.simulated else quantizer.channel_order
        stages.append([observed.original(window), rotated, smooth(rotated, scheme, order)])
        errors.add(weight, rounded, rotated, quantizer.simulate(rotated))
    scaled = [_in_units_of_a_token(torch.stack(windows)) for windows in zip(*stages, strict=True)]
    magnitude = torch.cat(observed.token_absmax)
    return InputAnalysis(
        ratio={name: _ratio(stage) for name, stage in zip(STAGES, scaled, strict=True)},
        output_error=errors.relative(errors.both),
        activation_error=errors.relative(errors.activations),
        weight_error=errors.relative(errors.weights),
        token_error=float(torch.cat(errors.tokens).median()),
        spikes=_spikes(magnitude, observed),
        median_magnitude=float(magnitude.median()),
        channel_absmax=torch.stack([stage.abs().amax((0, 1)) for stage in scaled]),
        token_absmax=torch.stack([stage[0].abs().amax(1) for stage in scaled]),
        magnitudes=torch.stack([_pooled(stage[0].abs()) for stage in scaled]),
    )


class _Errors:
    """Sums of squares of outputs and of their errors, and the relative error of each token."""

    def __init__(self) -> None:
        self.signal = self.both = self.activations = self.weights = 0.0
        self.tokens: list[Tensor] = []

    def add(self, weight: Tensor, rounded: Tensor, x: Tensor, quantized: Tensor) -> None:
        exact = x @ weight.t()
        error = quantized @ rounded.t() - exact
        self.signal += _energy(exact)
        self.both += _energy(error)
        self.activations += _energy(quantized @ weight.t() - exact)
        self.weights += _energy(x @ rounded.t() - exact)
        self.tokens.append(error.norm(dim=1) / exact.norm(dim=1).clamp_min(_TINY))

    def relative(self, energy: float) -> float:
        return float((energy / max(self.signal, _TINY)) ** 0.5)


def _energy(x: Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))


def _rounded_to_nearest(weight: Tensor, recipe: Weights, order: Tensor | None) -> Tensor:
    """The weight on the recipe's grid, by rounding to nearest, columns in their original order."""
    nearest = recipe.model_copy(update={"method": "rtn"})
    ordered = weight if order is None else weight[:, order]
    values = quantize_weight(ordered, nearest, None).values()
    return values if order is None else torch.empty_like(values).index_copy_(1, order.long(), values)


def _in_units_of_a_token(x: Tensor) -> Tensor:
    return x / _rms(x).median()


def _ratio(x: Tensor) -> float:
    return float((x.abs().amax(2) / _rms(x)).mean())


def _rms(x: Tensor) -> Tensor:
    """Root mean squares ``[windows, tokens]`` of tokens."""
    return x.square().mean(2).sqrt().clamp_min(_TINY)


def _pooled(magnitude: Tensor) -> Tensor:
    tokens, channels = (min(a, b) for a, b in zip(magnitude.shape, (MAP_TOKENS, MAP_CHANNELS), strict=True))
    return adaptive_max_pool2d(magnitude[None, None], (tokens, channels))[0, 0]


def _spikes(magnitude: Tensor, observed: ObservedInput) -> list[tuple[int, int, float]]:
    """The tokens of the largest magnitudes, among all calibration tokens."""
    assert observed.sample is not None
    top = magnitude.topk(min(_SPIKES, magnitude.numel()))
    length = observed.window_length
    return [
        (int(flat) // length, int(flat) % length, float(value))
        for value, flat in zip(top.values, top.indices, strict=True)
    ]
