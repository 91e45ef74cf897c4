"""The output head in 8 or 4 bits, its input in floating point: logits are too sensitive for INT4 inputs."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..models import ModelFamily
from ..recipe import Recipe
from ..runtime.assemble import quantize_head_module
from ..runtime.modules.int8_linear import Int8Linear
from .calibration.precision import calibration_products
from .calibration.statistics import InputStatistics
from .calibration.stream import HiddenStates
from .weights import quantize_weight, warn_of_fallback

__all__ = ["head_hessian", "quantize_head"]

# Rows quantized at once: the search for scales keeps several copies of them in float32.
_ROWS = 16384


def quantize_head(
    model: nn.Module, family: ModelFamily, recipe: Recipe, hessian: Tensor | None, device: torch.device
) -> bool:
    """Quantize the output head, which is untied and folded, as the recipe says.

    Args:
        model: its layers are quantized.
        family: where its parts are.
        recipe: ``head`` and, for 4 bits, ``weights``.
        hessian: of its input, :func:`head_hessian`'s; None for round to nearest.
        device: where to compute.

    Returns:
        False if GPTQ was asked for and could not be used.
    """
    original: Any = model.get_submodule(family.head)
    new: Any = quantize_head_module(model, family, recipe)
    if new is None:
        return True
    if original.bias is not None:
        new.bias.copy_(original.bias.detach())
    if isinstance(new, Int8Linear):
        new.set_weight(original.weight.detach())
        return True
    parts = [
        quantize_weight(rows.detach().to(device, torch.float32), recipe.weights, hessian)
        for rows in original.weight.split(_ROWS)
    ]
    multipliers = [part.multiplier for part in parts if part.multiplier is not None]
    new.set_weight(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scale for part in parts]),
        torch.cat(multipliers) if multipliers else None,
    )
    fell_back = any(part.fell_back for part in parts)
    if fell_back:
        warn_of_fallback(f"The output head '{family.head}'")
    return not fell_back


def head_hessian(
    model: nn.Module, family: ModelFamily, hidden: HiddenStates, device: torch.device
) -> Tensor | None:
    """``Σ x xᵀ`` of the output head's input, float32 ``[hidden, hidden]``, of the text behind all layers."""
    norm = copy.deepcopy(model.get_submodule(family.final_norm)).to(device, torch.float32)
    statistics = InputStatistics(hidden.batches[0].shape[-1], device)
    with torch.inference_mode(), calibration_products(device):
        for batch in hidden.batches:
            statistics.add(norm(hidden.on_device(batch)))
    return None if statistics.hessian is None else statistics.hessian.matrix()
