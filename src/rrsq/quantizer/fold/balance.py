"""Balancing an input's channels between what is large in the activations and what is large in the weights.

With a diagonal ``D``, ``W x = (W D⁻¹) (D x)``. Rounding ``D x`` and ``W D⁻¹`` adds an error in proportion to
``E‖D x‖² ‖W D⁻¹‖²``, which is least for ``D_k⁴ = ‖W_:k‖² / E x_k²``. ``D`` goes into the gain of the norm in
front, ``D⁻¹`` into all linears that read it. It is the diagonal case of WUSH (arXiv 2512.00956) and of CAT
(arXiv 2603.04359).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...models import LinearInput, ModelFamily, NormKind
from .online import matrices

__all__ = ["balance_factors", "balance_norms", "balanced_norms", "read_energy"]

_RANGE = 1e4
"""Factors beyond this, and below its inverse, are cut: channels that are dead on the calibration text."""


def balanced_norms(layer: nn.Module, family: ModelFamily) -> dict[str, tuple[LinearInput, ...]]:
    """The norms that a layer's inputs come from, by their path, each with the inputs that read it."""
    found: dict[str, tuple[LinearInput, ...]] = {}
    for entry in family.inputs_in(layer):
        if entry.norm is not None:
            found[entry.norm] = (*found.get(entry.norm, ()), entry)
    return found


def read_energy(layer: nn.Module, entries: tuple[LinearInput, ...]) -> Tensor:
    """``‖W_:k‖²`` of all linears that read a norm's output, those in full precision among them.

    Args:
        layer: holds the weights, as the norm with its gain is in front of them.
        entries: all inputs that come from the norm.

    Returns:
        float64 ``[channels]``.
    """
    return torch.stack([weight.double().square().sum(0) for weight in _readers(layer, entries)]).sum(0)


def balance_factors(read: Tensor, energy: Tensor) -> Tensor:
    """``D`` of a norm's output.

    Args:
        read: ``[channels]``, see :func:`read_energy`.
        energy: ``[channels]``, the mean square of each channel over tokens.

    Returns:
        float32 ``[channels]``, positive, of geometric mean 1; 1 for channels that are zero or read by nobody.
    """
    energy, read = energy.double(), read.double()
    known = (energy > 0) & (read > 0)
    if not bool(known.any()):
        return torch.ones_like(energy, dtype=torch.float32)
    log = torch.zeros_like(energy)
    log[known] = (read[known].log() - energy[known].log()) / 4
    log[known] -= log[known].mean()
    return log.exp().clamp(1 / _RANGE, _RANGE).float()


def balance_norms(layer: nn.Module, family: ModelFamily, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fold factors into norms and the linears behind them, in place; the layer computes what it did.

    Args:
        layer: a decoder layer, its linears in floating point.
        family: of the model.
        factors: ``[channels]`` by the path of the norm.

    Returns:
        The factors as they are: what the gains, rounded to their dtype, were multiplied by; float32. Where a
        gain is zero, or becomes it or infinite, the factor is 1.
    """
    done = {}
    for path, entries in balanced_norms(layer, family).items():
        if path in factors:
            norm: Any = layer.get_submodule(path)
            done[path] = _scale_norm(norm, family.norm, factors[path])
            for weight in _readers(layer, entries):
                weight.copy_(weight.float() / done[path])
    return done


def _scale_norm(norm: Any, kind: NormKind, factors: Tensor) -> Tensor:
    """Multiply a norm's gain (and bias); the factors that this was in the norm's dtype."""
    before = kind.offset + norm.weight.detach().float()
    with torch.no_grad():
        weight = (before * factors - kind.offset).to(norm.weight.dtype)
        after = kind.offset + weight.float()
        exact = after / before
        usable = torch.isfinite(exact) & (exact > 0)
        norm.weight.copy_(torch.where(usable, weight, norm.weight))
        exact = torch.where(usable, exact, 1.0)
        if getattr(norm, "bias", None) is not None:
            norm.bias.copy_(norm.bias.float() * exact)
    return exact


def _readers(layer: nn.Module, entries: tuple[LinearInput, ...]) -> list[Tensor]:
    """The matrices ``[out, channels]`` of all linears that read the inputs, one for each expert."""
    paths = dict.fromkeys(p for entry in entries for p in (*entry.linear_paths, *entry.full_precision))
    weights: list[Any] = [layer.get_submodule(path) for path in paths]
    return [matrix for linear in weights for matrix in matrices(linear.weight)]
