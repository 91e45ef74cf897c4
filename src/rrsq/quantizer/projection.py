"""How much memory a quantization will need at its peak, from the shapes of a model and the recipe alone.

One decoder layer is on the device at a time, so the number of layers does not matter. The peak is the largest
of these phases: a layer is observed (its weights in float32, half of each Hessian and one batch); one of its
inputs is quantized (what is left of the weights and Hessians, and GPTQ's copies); the embedding or the head
is folded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..models import LinearInput, ModelFamily, family_for
from ..recipe import Recipe
from ..runtime.modules.int8_linear import PIECE
from ..runtime.scheme import embedding_is_kept, group_size_for, head_is_kept, sections, treatment
from .calibration.hessian import SymmetricSum
from .experts import HESSIAN_BYTES, batches_of_experts
from .needs import needs_hessian

__all__ = ["BATCH_TOKENS", "ProjectedMemory", "projected_memory"]

BATCH_TOKENS = 4096
_FLOAT = 4
_STREAM = 2  # bfloat16
# Folding and the grid search take pieces of so many elements. Of each, folding has five copies in float64 and
# the search four in float32, refinement six.
_PIECE = 2**24
_FOLDED, _SEARCHED, _REFINED = 5 * 8 + 2, 4 * 4, 6 * 4
# Of a piece of the embedding or the head: itself, rotated, and what its search takes; in 8 bits itself, over
# its scales, rounded, and the codes.
_ROUNDED_TO_4, _ROUNDED_TO_8 = 2 * 4 + _SEARCHED, 3 * 4 + 1


@dataclass(frozen=True)
class ProjectedMemory:
    """Bytes at the peak, of tensors; a process takes some hundred MB more, a CUDA context as well.

    Attributes:
        device: where layers are computed.
        host: in memory beside the activations, if the device is a GPU.
        activations: the residual stream of all calibration text, in memory or in a mapped file.
        routed: of ``host``, what goes into the experts of a layer.
        offloaded: the latter.
        working: what the eager reference needs to quantize the activations of a batch, on a CPU.
    """

    device: int
    host: int
    activations: int
    routed: int = 0
    offloaded: bool = False
    working: int = 0

    def memory(self, device: str) -> int:
        """Bytes of ordinary memory, for ``cpu`` or ``cuda``."""
        kept = 0 if self.offloaded else self.activations
        return kept + (
            max(self.device + self.routed + self.working, self.host) if device == "cpu" else self.host
        )

    def describe(self, device: str) -> str:
        """One line for the user."""
        where = f", {self.activations / 1e9:.1f} GB in the offload folder" if self.offloaded else ""
        gpu = "" if device == "cpu" else f"{self.device / 1e9:.1f} GB on the GPU, "
        return f"Projected peak: {gpu}{self.memory(device) / 1e9:.1f} GB of memory{where}."


def projected_memory(
    model: nn.Module, recipe: Recipe, samples: int, tokens: int, *, offloaded: bool = False
) -> ProjectedMemory:
    """Project the peak of quantizing a model.

    Args:
        model: of transformers; its tensors may be on the meta device.
        recipe: what will be done.
        samples, tokens: calibration windows and their length; 0 without calibration.
        offloaded: the residual stream will be in a mapped file.
    """
    config: Any = model.config
    family = family_for(config)
    hidden = family.sizes(config).hidden
    batch = min(samples, max(1, BATCH_TOKENS // tokens)) * tokens if tokens else 0
    layers: Any = model.get_submodule(family.layers)
    distinct = {tuple(p.shape for p in layer.parameters()): (i, layer) for i, layer in enumerate(layers)}
    device = max(
        _layer_peak(layer, index, family, recipe, config, hidden, batch) for index, layer in distinct.values()
    )
    routed = 0
    if batch and needs_hessian(recipe) and any(_mixture(layer, family) for _, layer in distinct.values()):
        routed = samples * tokens * hidden * _FLOAT  # What goes into the experts of a layer.
    ends = [model.get_submodule(path) for path in (family.embedding, family.head)]
    others = [model.get_submodule(path) for path in family.other_modules(model)]
    folded = _FOLDED if recipe.rotation is not None and recipe.rotation.residual else 0
    host = max(
        *(_bytes(layer) + routed for _, layer in distinct.values()),
        *(_bytes(module) + folded * _piece(module) for module in ends),
        _embedding_peak(ends[0], family, recipe),
        _head_peak(ends[1], family, recipe),
        *(_bytes(module) for module in others),
        _bytes(ends[0]) + 3 * _FLOAT * batch * hidden,
    )
    # Rotated, scaled and rounded copies of the widest input, two at a time beside what is counted as its own.
    widest = max(e.shape(layer)[0] for _, layer in distinct.values() for e in family.inputs_in(layer))
    quantized = any(activations.bits < 16 for _, activations in sections(recipe))
    working = 2 * _FLOAT * batch * widest * quantized
    return ProjectedMemory(device, host, samples * tokens * hidden * _STREAM, routed, offloaded, working)


def _embedding_peak(embedding: nn.Module, family: ModelFamily, recipe: Recipe) -> int:
    """The embedding beside its codes, a piece of it being rounded."""
    if embedding_is_kept(recipe, family):
        return _bytes(embedding)
    rows, channels = embedding.get_parameter("weight").shape
    codes, rounded = rows * (channels + _FLOAT), _ROUNDED_TO_8
    if recipe.embedding.bits == 4:
        rounded = _ROUNDED_TO_4
        group_size = group_size_for(recipe.embedding.group_size, channels)
        codes = rows * (channels // 2 + _FLOAT + (0 if group_size is None else channels // group_size))
    return _bytes(embedding) + codes + rounded * min(PIECE, rows * channels)


def _head_peak(head: nn.Module, family: ModelFamily, recipe: Recipe) -> int:
    """The head beside its codes, a piece of it being rounded; one that shares the embedding's needs less."""
    if head_is_kept(recipe, family):
        return _bytes(head)
    if recipe.head.bits == 4:
        return _bytes(head) + _FOLDED * _piece(head)
    rows, channels = head.get_parameter("weight").shape
    return _bytes(head) + rows * (channels + _FLOAT) + _ROUNDED_TO_8 * min(PIECE, rows * channels)


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _piece(module: nn.Module) -> int:
    """Elements of its largest matrix that are folded at once."""
    return max(min(_PIECE, parameter.shape[-2:].numel()) for parameter in module.parameters())


def _layer_peak(
    layer: nn.Module,
    index: int,
    family: ModelFamily,
    recipe: Recipe,
    config: Any,
    hidden: int,
    batch: int,
) -> int:
    weights = sum(_FLOAT * parameter.numel() for parameter in layer.parameters())
    shapes = [entry.shape(layer) for entry in family.inputs_in(layer)]
    by_gptq = [
        bool(batch) and not entry.experts and _method(recipe, family, index, entry) == "gptq"
        for entry in family.inputs_in(layer)
    ]
    sums = [_sum_bytes(channels) * used for (channels, _), used in zip(shapes, by_gptq, strict=True)]
    # Of a batch: what an MLP has between its linears (gate, up and two products of them), the residual stream
    # twice, and the outputs that errors are measured against. A mixture does it for each expert of a token.
    chosen = config.num_experts_per_tok if _mixture(layer, family) else 1
    widest = max(
        rows * (chosen if entry.experts else 1)
        for (_, rows), entry in zip(shapes, family.inputs_in(layer), strict=True)
    )
    forward = _FLOAT * batch * (2 * widest + (3 + chosen) * hidden)
    folded = 0 if recipe.rotation is None else _FOLDED
    peaks = [weights + folded * _piece(layer), weights + sum(sums) + forward]
    left, waiting = weights, sum(sums)
    for (channels, rows), kept, entry in zip(shapes, sums, family.inputs_in(layer), strict=True):
        count = channels * rows
        if entry.experts:
            continue
        left -= _FLOAT * count
        waiting -= kept
        hessian = _FLOAT * channels**2 if kept else 0
        # The stacked weight in float32 is there while its grid is searched; then GPTQ's own copy, codes of a
        # byte and the factor of the Hessian, or refinement's copies of some rows with two sets of codes and
        # another Hessian; then the codes, their steps and what they stand for.
        searched = _FLOAT * count + _SEARCHED * min(_PIECE, count)
        rounded = 2 * hessian + 9 * count if kept else 0
        if kept and _refines(recipe, family, index, entry):
            rounded = max(rounded, 2 * hessian + 6 * count + _REFINED * min(_PIECE, count))
        peaks.append(left + waiting + max(hessian + searched, rounded, hessian + 13 * count))
        left += count // 2
    mixture = _mixture(layer, family)
    if mixture:
        methods = [_method(recipe, family, index, entry) for entry in mixture]
        refined = any(_refines(recipe, family, index, entry) for entry in mixture)
        peaks.append(left + _experts_peak(layer, mixture, methods, batch, refined=refined))
    return max(peaks)


def _experts_peak(
    layer: nn.Module, mixture: list[LinearInput], methods: list[str], batch: int, *, refined: bool
) -> int:
    """Beside the weights of the layer: the packed experts, the Hessians of some of them, and one at work."""
    shapes = [entry.shape(layer) for entry in mixture]
    experts = _number_of_experts(layer, mixture[0])
    packed = sum(experts * channels * rows for channels, rows in shapes) // 2
    working = max((6 + _REFINED if refined else 13) * channels * rows for channels, rows in shapes)
    if not batch or "gptq" not in methods:
        return packed + working
    runs = batches_of_experts(experts, [channels for channels, _ in shapes], HESSIAN_BYTES)
    sums = len(runs[0]) * sum(_sum_bytes(channels) for channels, _ in shapes)
    widest = max(channels for channels, _ in shapes)
    measuring = _FLOAT * batch * sum(channels + rows for channels, rows in shapes)
    return packed + sums + max(working + 2 * _FLOAT * widest**2, measuring)


def _mixture(layer: nn.Module, family: ModelFamily) -> list[LinearInput]:
    return [entry for entry in family.inputs_in(layer) if entry.experts]


def _number_of_experts(layer: nn.Module, entry: LinearInput) -> int:
    return layer.get_parameter(entry.linear_paths[0]).shape[0]


def _sum_bytes(channels: int) -> int:
    return sum(part.nbytes for part in SymmetricSum(channels, torch.device("meta")).parts)


def _refines(recipe: Recipe, family: ModelFamily, index: int, entry: LinearInput) -> bool:
    return treatment(recipe, family.layer_name(index), entry).weights.refinement > 0


def _method(recipe: Recipe, family: ModelFamily, index: int, entry: LinearInput) -> str:
    how = treatment(recipe, family.layer_name(index), entry)
    return how.weights.method if how.linears else "none"
