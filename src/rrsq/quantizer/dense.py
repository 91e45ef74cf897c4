"""Quantizing the linears of one input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..models import LinearInput
from ..runtime.assemble import quantize_input_modules
from ..runtime.rotation.rotations import Rotations
from ..runtime.scheme import Treatment
from .calibration.statistics import InputSummary
from .checks import check_activations
from .weights import in_order, output_snr_db, quantize_weight, warn_of_fallback

__all__ = ["QuantizedInput", "quantize_input"]


@dataclass(frozen=True)
class QuantizedInput:
    """What became of an input's linears.

    Attributes:
        snr_db: signal over error of their outputs, by the input's Hessian; None without one.
        fell_back: GPTQ was asked for and could not be used.
    """

    snr_db: float | None = None
    fell_back: bool = False


def quantize_input(
    layer: nn.Module,
    index: int,
    entry: LinearInput,
    how: Treatment,
    rotations: Rotations,
    known: InputSummary | None,
    device: torch.device,
) -> QuantizedInput:
    """Quantize the linears of one input of a decoder layer in place.

    Args:
        layer: on the device, rotated, in float32.
        index: its position, for messages.
        entry: one of its inputs, no experts'.
        how: what the recipe does to it.
        rotations: of the model.
        known: of the input, as the linears read it; None without calibration.
        device: where it is computed.

    Raises:
        NonFiniteError: the input was NaN or infinite on the calibration text.
    """
    where = f"Layer {index}, input '{entry.path}'"
    absmax = None if known is None else known.absmax
    if absmax is not None:
        check_activations(absmax, where)
    parent: Any = layer.get_submodule(entry.parent)
    originals = [getattr(parent, name) for name in how.linears]
    replaced = quantize_input_modules(layer, entry, how, rotations)
    if not replaced:
        return QuantizedInput()
    weight = torch.cat([linear.weight.detach() for linear in originals])
    biases = [linear.bias for linear in originals]
    del originals  # The copy is enough.
    quantizer: Any = getattr(parent, entry.quantizer_name)
    hessian = None if known is None or known.hessian is None else known.hessian.matrix()
    del known  # The matrix is enough: there is room for one of them on a GPU.
    if quantizer.scheme.stores_order and absmax is not None:
        quantizer.channel_order.copy_(absmax.argsort(stable=True))
    weight, hessian = in_order(weight, hessian, quantizer.channel_order)
    quantized = quantize_weight(weight, how.weights, hessian)
    quantized.store(list(replaced.values()))
    snr_db = None if hessian is None else output_snr_db(weight, quantized.values(), hessian)
    for linear, bias in zip(replaced.values(), biases, strict=True):
        if bias is not None and linear.bias is not None:
            linear.bias.copy_(bias.detach())
    quantizer.to(device)
    for linear in replaced.values():
        linear.to(device)
    if quantized.fell_back:
        warn_of_fallback(where)
    return QuantizedInput(snr_db, quantized.fell_back)
