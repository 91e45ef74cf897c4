"""Quantizing a model: rotate, calibrate and quantize one decoder layer after the other, in running order.

Each layer is moved to the compute device in float32, rotated, observed once on the outputs of the already
quantized layers before it (Hessians, magnitudes, means), quantized, and run once more to make the next
layer's inputs. Only that layer and one batch of activations are on the device at a time, and a
:class:`~rrsq.quantizer.store.ModelStore` need not hold more of the weights than that layer's either. What
goes into the experts of a mixture is kept in between, since their Hessians are taken a few experts at a time.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models import ModelFamily, ModelSizes, family_for
from ..recipe import Recipe
from ..runtime.assemble import RotationSigns, key_rotary, treated_inputs
from ..runtime.format.loading import check_token_ids
from ..runtime.modules.linear import QuantizedLinear
from ..runtime.rotation.rotations import Rotations, make_rotations
from ..runtime.scheme import (
    changes_linears,
    check_recipe,
    head_is_kept,
    head_shares_codes,
    keeps_tie,
    treatment,
)
from .cache import SENSITIVE_KEY_BITS, quantize_cache, sensitive_layers
from .calibration.stored import StoredCalibration
from .calibration.stream import HiddenStates
from .checks import check_result, check_rope, check_stored
from .dense import quantize_input
from .embedding import quantize_embedding
from .experts import quantize_experts
from .fold.blocks import rotate_in_blocks
from .fold.rotations import fold_embedding, fold_head, fold_layer, untie_head
from .head import quantize_head
from .memory import PeakMemory
from .needs import needs_calibration, needs_head_hessian
from .observe import Activations, Nothing, RunningText, Step, StoredStatistics
from .options import DEFAULTS, QuantizationOptions
from .outcome import LayerReport, QuantizationReport
from .store import InMemoryStore, ModelStore

__all__ = ["QuantizedModel", "needs_calibration", "quantize_model"]

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class QuantizedModel:
    """A model quantized in place, with what a checkpoint must say of it."""

    model: nn.Module
    recipe: Recipe
    rotations: Rotations
    key_bits: list[int]
    report: QuantizationReport


def quantize_model(
    model: nn.Module,
    recipe: Recipe,
    calibration: Tensor | StoredCalibration | None,
    options: QuantizationOptions = DEFAULTS,
    *,
    store: ModelStore | None = None,
    progress: Progress = lambda done, total, text: None,
) -> QuantizedModel:
    """Quantize a causal language model of transformers in place.

    Args:
        model: in any floating dtype, on the CPU; its linears are replaced. On the meta device with ``store``.
        recipe: what to do.
        calibration: windows of text, int64 ``[samples, tokens]``; or statistics of this model in full
            precision, to use in place of running text, of which that they are its own is not checked here
            (:meth:`StoredCalibration.check_model`); None if :func:`needs_calibration` says so.
        options: how it is carried out.
        store: where the weights are, if not in ``model``.
        progress: called with steps done, steps in all, and what is being done.

    Returns:
        The model with its report. Weights of quantized linears are packed; everything else keeps its dtype.
        The weights are where ``store`` put them.

    Raises:
        CalibrationError: stored statistics lack what the recipe needs, or are damaged.
        DataError: the model has no embedding for a token of the windows.
        NonFiniteError: a weight or, on the calibration text, an activation is NaN or Inf, or becomes it.
        RecipeError: the recipe's key offsets do not go with the model's RoPE, a pattern matches
            nothing, or a linear to quantize has an odd number of input channels.
        UnsupportedArchitectureError: no family is known for the model.
        UsageError: there are more workers than windows.
    """
    family = family_for(model.config)
    check_rope(model.config, recipe)
    check_recipe(recipe, family, model)
    if isinstance(calibration, StoredCalibration):
        check_stored(calibration, recipe, options.seed)
    elif calibration is not None:
        check_token_ids(model, calibration)
    elif needs_calibration(recipe):
        raise ValueError(f"recipe '{recipe.name}' needs calibration windows")
    started = time.perf_counter()
    store = store or InMemoryStore(model)
    plan = _Plan.of(model.eval().requires_grad_(False), recipe, family, options)
    report = QuantizationReport(bytes_before=store.bytes_before)
    with PeakMemory(plan.device) as memory:
        store.check()
        if not keeps_tie(recipe, family, folds_residual=plan.rotations.residual is not None):
            untie_head(model, family)
        _begin(plan, store, report)
        activations = _activations(plan, calibration, store)
        _leave_embedding(plan, store, activations)
        steps = _Steps([_steps_of(plan, layer, activations) for layer in plan.layers], progress)
        steps.skip(len(report.layers))
        for index in range(len(report.layers), len(plan.layers)):
            name = family.layer_name(index)
            store.open(name)
            step = steps.of_layer(index)
            done = _quantize_layer(plan, index, activations, step)
            report.layers.append(done)
            store.close(name)
            store.commit(done, _stream(activations))
            step("written")
        _end(plan, store, activations, report)
        key_bits = _key_bits(plan, report)
        report.bytes_after = store.bytes_after()
        report.seconds = time.perf_counter() - started
        memory.write(report)
    return QuantizedModel(model, recipe, plan.rotations, key_bits, report)


@dataclass(frozen=True)
class _Plan:
    """What is to be done to which model and how, known before anything is."""

    model: nn.Module
    layers: Any
    recipe: Recipe
    family: ModelFamily
    sizes: ModelSizes
    rotations: Rotations
    device: torch.device
    options: QuantizationOptions

    @classmethod
    def of(cls, model: nn.Module, recipe: Recipe, family: ModelFamily, options: QuantizationOptions) -> _Plan:
        sizes = family.sizes(model.config)
        rotations = make_rotations(recipe.rotation, sizes, options.seed, folds_residual=family.folds_residual)
        layers = model.get_submodule(family.layers)
        device = torch.device(options.device)
        return cls(model, layers, recipe, family, sizes, rotations, device, options)

    @property
    def embeddings(self) -> list[str]:
        """Paths of the modules that make the residual stream."""
        return [path for path in (self.family.embedding, self.family.positions) if path is not None]


class _Steps:
    """Progress: counts the steps of all layers."""

    def __init__(self, per_layer: list[int], progress: Progress) -> None:
        self.per_layer = per_layer
        self.progress = progress
        self.done = 0

    def skip(self, layers: int) -> None:
        """The first layers are finished already."""
        self.done = sum(self.per_layer[:layers])

    def of_layer(self, index: int) -> Step:
        """What a layer's steps are reported to."""

        def step(text: str) -> None:
            self.done += 1
            self.progress(self.done, sum(self.per_layer), f"layer {index + 1}/{len(self.per_layer)}: {text}")

        return step


def _steps_of(plan: _Plan, layer: nn.Module, activations: Activations) -> int:
    """Steps of progress of one layer: those of the text, one an input, reading and writing."""
    inputs = len(plan.family.inputs_in(layer)) if changes_linears(plan.recipe) else 0
    return activations.steps + inputs + 2


def _begin(plan: _Plan, store: ModelStore, report: QuantizationReport) -> None:
    """Rotate and quantize the embedding, or take up what an earlier run finished."""
    for path in plan.embeddings:
        store.open(path)
    if store.progressed is not None:
        report.layers = list(store.progressed.layers)
        return
    for path in plan.family.other_modules(plan.model):
        store.open(path)
        store.close(path)
    fold_embedding(plan.model, plan.family, plan.rotations)
    quantize_embedding(plan.model, plan.family, plan.recipe, plan.device)


def _activations(
    plan: _Plan, calibration: Tensor | StoredCalibration | None, store: ModelStore
) -> Activations:
    """Where this run learns of activations; text is embedded here, or taken up behind the finished layers."""
    if isinstance(calibration, StoredCalibration):
        return StoredStatistics(calibration, plan.recipe, plan.family, plan.rotations, plan.device)
    if calibration is None:
        return Nothing()
    workers = plan.options.workers
    hidden = HiddenStates(
        plan.model,
        plan.family,
        workers.part(calibration),
        plan.device,
        dtype=plan.options.stream_dtype,
        allocate=store.allocate,
        stream=None if store.progressed is None else store.progressed.stream,
    )
    return RunningText(hidden, plan.recipe, plan.family, plan.device, workers, store.before_overwrite)


def _leave_embedding(plan: _Plan, store: ModelStore, activations: Activations) -> None:
    """The text is through the embedding: it is finished, or was before."""
    for path in plan.embeddings:
        if store.progressed is not None:
            store.drop(path)
        else:
            check_result(plan.model.get_submodule(path), path)
            store.close(path)
    if store.progressed is None:
        store.commit(None, _stream(activations))


def _stream(activations: Activations) -> tuple[Tensor, ...]:
    """The residual stream in its batches; none where no text runs."""
    return () if activations.hidden is None else activations.hidden.batches


def _quantize_layer(plan: _Plan, index: int, activations: Activations, step: Step) -> LayerReport:
    """Rotate, observe and quantize one decoder layer, and run the text through it."""
    started = time.perf_counter()
    report = LayerReport(index)
    layer, family, recipe, device = plan.layers[index], plan.family, plan.recipe, plan.device
    name = family.layer_name(index)
    inputs = treated_inputs(layer, family, recipe)
    dtypes = {key: value.dtype for key, value in layer.named_parameters()}
    layer.to(device=device, dtype=torch.float32)
    if recipe.rotation is not None:
        fold_layer(layer, family, plan.rotations, plan.sizes)
    step("read")
    rotary = key_rotary(plan.model, family, index)
    known = activations.of_layer(index, layer, inputs, rotary, step)
    statistics = known.statistics
    if recipe.rotation is not None and plan.rotations.blocks is not None:
        statistics = rotate_in_blocks(
            layer, family, plan.rotations, statistics, known.routed, balance=recipe.rotation.balance
        )
    if recipe.kv_cache is not None:
        means, hidden = statistics.means, activations.hidden
        report.cache_error = quantize_cache(
            layer, family, recipe.kv_cache, plan.sizes, rotary, means, hidden, device
        )
    for entry in inputs:
        if not entry.experts:
            how = treatment(recipe, name, entry)
            # Not kept here: there is room for one Hessian on a GPU.
            summaries = statistics.inputs
            done = quantize_input(
                layer, index, entry, how, plan.rotations, summaries.pop(entry.path, None), device
            )
            report.add(entry.path, done.snr_db, fell_back=done.fell_back)
            step("weights")
    mixture = {entry: treatment(recipe, name, entry) for entry in inputs if entry.experts}
    if mixture:
        experts = quantize_experts(
            layer,
            mixture,
            plan.rotations,
            known.routed,
            device,
            plan.options.hessian_bytes,
            plan.options.workers,
        )
        report.undersampled_experts = experts.undersampled
        report.fallbacks += experts.fallbacks
        for message in experts.messages(index):
            warnings.warn(message, stacklevel=3)
    for _ in mixture:
        step("weights")
    plan.options.workers.share(layer)
    report.output_snr_db = activations.advance(index, layer, known.reference, step)
    _restore_dtypes(layer, dtypes)
    check_result(layer, name)
    layer.to("cpu")
    report.seconds = time.perf_counter() - started
    return report


def _end(plan: _Plan, store: ModelStore, activations: Activations, report: QuantizationReport) -> None:
    """What stands behind the layers: the final norm, the output head, and the rotations' signs."""
    model, family, recipe = plan.model, plan.family, plan.recipe
    shared = head_shares_codes(recipe, family, model.config)
    paths = (family.final_norm,) if shared else (family.final_norm, family.head)
    for path in paths:
        store.open(path)
    fold_head(model, family, plan.rotations)
    hessian = None
    if needs_head_hessian(recipe) and not head_is_kept(recipe, family):
        hessian = activations.head_hessian(model)
    report.head_fell_back = not quantize_head(model, family, recipe, hessian, plan.device)
    if recipe.rotation is not None:
        model.rotation_signs = RotationSigns(plan.rotations)
        store.close("rotation_signs")
    for path in paths:
        check_result(model.get_submodule(path), path)
        store.close(path)


def _key_bits(plan: _Plan, report: QuantizationReport) -> list[int]:
    """Key bits of each layer; the layers the 4-bit cache hurts most get 8 if the recipe grants it."""
    cache = plan.recipe.kv_cache
    if cache is None:
        return []
    bits: list[int] = [cache.keys.bits] * len(plan.layers)
    report.sensitive_layers = sensitive_layers(cache, report.layers)
    for index in report.sensitive_layers:
        bits[index] = SENSITIVE_KEY_BITS
        attention: Any = plan.layers[index].get_submodule(plan.family.attention)
        # A layer that an earlier run finished has none here; a checkpoint says it by the list of bits.
        if hasattr(attention, "kv_quantizer"):
            attention.kv_quantizer.keys.set_bits(SENSITIVE_KEY_BITS)
    return bits


def _restore_dtypes(layer: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Cast what is left in full precision (norms, biases) back to what it was."""
    fallback = next(iter(dtypes.values()))
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.data = parameter.data.to(dtypes.get(name, fallback))
        for module in layer.modules():
            if isinstance(module, QuantizedLinear) and module.bias is not None:
                module.bias = module.bias.to(fallback)
