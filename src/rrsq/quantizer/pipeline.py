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

from ..errors import UsageError
from ..models import LinearInput, ModelFamily, family_for
from ..recipe import Recipe
from ..runtime.assemble import RotationSigns, key_rotary, quantize_input_modules, treated_inputs
from ..runtime.format.loading import check_token_ids
from ..runtime.modules.linear import QuantizedLinear
from ..runtime.rotation.rotations import Rotations, make_rotations
from ..runtime.scheme import changes_linears, check_recipe, head_is_kept, treatment
from .cache import SENSITIVE_KEY_BITS, quantize_cache, sensitive_layers
from .calibration.basis import InputBasis, affine_of_head
from .calibration.experts import RoutedTokens
from .calibration.statistics import InputSummary, LayerStatistics
from .calibration.stored import StoredCalibration
from .calibration.stream import HiddenStates
from .calibration.workers import ALONE, Workers
from .checks import check_activations, check_result, check_rope, check_stored
from .cholesky import permuted
from .experts import HESSIAN_BYTES, quantize_experts
from .fold.rotations import fold_embedding, fold_head, fold_layer, untie_head
from .head import head_hessian, quantize_head
from .measure import measure_layer, stored_statistics
from .memory import PeakMemory
from .needs import needs_calibration, needs_head_hessian
from .outcome import LayerReport, QuantizationReport
from .store import InMemoryStore, ModelStore
from .weights import output_snr_db, quantize_weight

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
    windows: Tensor | None,
    *,
    stored: StoredCalibration | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    hessian_bytes: int = HESSIAN_BYTES,
    stream_dtype: torch.dtype = torch.bfloat16,
    store: ModelStore | None = None,
    workers: Workers = ALONE,
    progress: Progress = lambda done, total, text: None,
) -> QuantizedModel:
    """Quantize a causal language model of transformers in place.

    Args:
        model: in any floating dtype, on the CPU; its linears are replaced. On the meta device with ``store``.
        recipe: what to do.
        windows: int64 ``[samples, tokens]`` calibration windows; None if :func:`needs_calibration` says so,
            or with ``stored``.
        stored: statistics of this model in full precision, to use in place of running text; that they are
            its own is not checked here (:meth:`StoredCalibration.check_model`).
        seed: of the rotations' random signs.
        device: where layers are computed.
        hessian_bytes: of experts, only so many are quantized at once as have Hessians of so many bytes.
        stream_dtype: in which the residual stream of the calibration text is kept between layers.
        store: where the weights are, if not in ``model``.
        workers: processes that share the calibration text; each is given all of it and runs its part.
        progress: called with steps done, steps in all, and what is being done.

    Returns:
        The model with its report. Weights of quantized linears are packed; everything else keeps its dtype.
        The weights are where ``store`` put them.

    Raises:
        CalibrationError: ``stored`` lacks what the recipe needs, or is damaged.
        DataError: the model has no embedding for a token of the windows.
        NonFiniteError: a weight or, on the calibration text, an activation is NaN or Inf, or becomes it.
        RecipeError: the recipe's key offsets do not go with the model's RoPE, a pattern matches
            nothing, or a linear to quantize has an odd number of input channels.
        UnsupportedArchitectureError: no family is known for the model.
        UsageError: several workers for a mixture of experts, or more than there are windows.
    """
    check_rope(model.config, recipe)
    check_recipe(recipe, family_for(model.config), model)
    if stored is not None:
        check_stored(stored, recipe, seed)
    elif windows is None and needs_calibration(recipe):
        raise ValueError(f"recipe '{recipe.name}' needs calibration windows")
    if windows is not None:
        check_token_ids(model, windows)
    if workers.count > 1 and any(entry.experts for entry in family_for(model.config).inputs):
        raise UsageError(
            "The calibration of a mixture of experts cannot be shared by several processes yet. Start one."
        )
    store = store or InMemoryStore(model)
    run = _Run(
        model,
        recipe,
        windows,
        stored,
        seed,
        torch.device(device),
        hessian_bytes,
        stream_dtype,
        store,
        workers,
        progress,
    )
    with run.memory:
        return run.execute()


class _Run:
    """One quantization run: the state that its steps share."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        windows: Tensor | None,
        stored: StoredCalibration | None,
        seed: int,
        device: torch.device,
        hessian_bytes: int,
        stream_dtype: torch.dtype,
        store: ModelStore,
        workers: Workers,
        progress: Progress,
    ) -> None:
        config: Any = model.config
        self.model = model.eval().requires_grad_(False)
        self.recipe = recipe
        self.windows = None if windows is None or stored is not None else workers.part(windows)
        self.stored = stored
        self.stream_dtype = stream_dtype
        self.store = store
        self.workers = workers
        self.device = device
        self.hessian_bytes = hessian_bytes
        self.progress = progress
        self.family: ModelFamily = family_for(config)
        self.sizes = self.family.sizes(config)
        self.rotations = make_rotations(
            recipe.rotation, self.sizes, seed, folds_residual=self.family.folds_residual
        )
        self.report = QuantizationReport(bytes_before=store.bytes_before)
        self.memory = PeakMemory(device)
        self.layers: Any = model.get_submodule(self.family.layers)
        self.steps = 0
        self.total_steps = 0

    def execute(self) -> QuantizedModel:
        started = time.perf_counter()
        self.store.check()
        if self.rotations.residual is not None or not head_is_kept(self.recipe, self.family):
            untie_head(self.model, self.family)
        hidden = self._begin()
        # Each batch twice, once for adding up what was measured; reading and writing.
        runs = 0 if hidden is None else 2 * len(hidden.batches) + 1
        per_layer = [runs + self._inputs_of(layer) + 2 for layer in self.layers]
        self.total_steps = sum(per_layer)
        finished = len(self.report.layers)
        self.steps = sum(per_layer[:finished])
        for index in range(finished, len(self.layers)):
            name = self.family.layer_name(index)
            self.store.open(name)
            self._quantize_layer(index, self.layers[index], hidden)
            self.store.close(name)
            self.store.commit(self.report.layers[-1], None if hidden is None else hidden.stream)
            self._step(f"{self._name(index)}: written")
        self._end(hidden)
        key_bits = self._key_bits()
        self.report.bytes_after = self.store.bytes_after()
        self.report.seconds = time.perf_counter() - started
        self.memory.write(self.report)
        return QuantizedModel(self.model, self.recipe, self.rotations, key_bits, self.report)

    def _begin(self) -> HiddenStates | None:
        """Fold the embedding and run the text through it, or take up what an earlier run finished."""
        paths = [path for path in (self.family.embedding, self.family.positions) if path is not None]
        progressed = self.store.progressed
        for path in paths:
            self.store.open(path)
        if progressed is not None:
            self.report.layers = list(progressed.layers)
            hidden = self._hidden_states(progressed.stream)
            for path in paths:
                self.store.drop(path)
            return hidden
        for path in self.family.other_modules(self.model):
            self.store.open(path)
            self.store.close(path)
        fold_embedding(self.model, self.family, self.rotations)
        hidden = self._hidden_states(None)
        for path in paths:
            check_result(self.model.get_submodule(path), path)
            self.store.close(path)
        self.store.commit(None, None if hidden is None else hidden.stream)
        return hidden

    def _hidden_states(
        self, stream: Callable[[tuple[int, ...], torch.dtype], Tensor] | None
    ) -> HiddenStates | None:
        if self.windows is None:
            return None
        return HiddenStates(
            self.model,
            self.family,
            self.windows,
            self.device,
            dtype=self.stream_dtype,
            allocate=self.store.allocate,
            stream=stream,
        )

    def _inputs_of(self, layer: nn.Module) -> int:
        return len(self.family.inputs_in(layer)) if changes_linears(self.recipe) else 0

    def _end(self, hidden: HiddenStates | None) -> None:
        """What stands behind the layers: the final norm, the output head, and the rotations' signs."""
        for path in (self.family.final_norm, self.family.head):
            self.store.open(path)
        fold_head(self.model, self.family, self.rotations)
        self._quantize_head(hidden)
        if self.recipe.rotation is not None:
            self.model.rotation_signs = RotationSigns(self.rotations)
            self.store.close("rotation_signs")
        for path in (self.family.final_norm, self.family.head):
            check_result(self.model.get_submodule(path), path)
            self.store.close(path)

    def _quantize_layer(self, index: int, layer: nn.Module, hidden: HiddenStates | None) -> None:
        started = time.perf_counter()
        report = LayerReport(index)
        name = self._name(index)
        inputs = treated_inputs(layer, self.family, self.recipe)
        dtypes = {key: value.dtype for key, value in layer.named_parameters()}
        layer.to(device=self.device, dtype=torch.float32)
        if self.recipe.rotation is not None:
            fold_layer(layer, self.family, self.rotations, self.sizes)
        self._step(f"{name}: read")
        linears = tuple(entry for entry in inputs if not entry.experts)
        mixture = tuple(entry for entry in inputs if entry.experts)
        rotary = key_rotary(self.model, self.family, index)
        statistics = LayerStatistics({}, {})
        routed: RoutedTokens | None = None
        reference: Tensor | None = None
        if self.stored is not None:
            statistics = stored_statistics(
                self.stored, index, layer, linears, self.family, self.rotations, self.recipe, self.device
            )
        elif hidden is not None:
            attention = layer.get_submodule(self.family.attention)
            measured = measure_layer(
                layer,
                inputs,
                attention,
                rotary,
                hidden,
                self.recipe,
                self.device,
                lambda: self._step(f"{name}: statistics"),
                self.workers,
            )
            statistics, routed, reference = measured.statistics, measured.routed, measured.reference
            del measured
        if self.recipe.kv_cache is not None:
            report.cache_error = quantize_cache(
                layer,
                self.family,
                self.recipe.kv_cache,
                self.sizes,
                rotary,
                statistics.means,
                hidden,
                self.device,
            )
        for entry in linears:
            self._quantize_input(layer, entry, statistics.inputs.pop(entry.path, None), report)
            self._step(f"{name}: weights")
        if mixture:
            self._quantize_experts(layer, mixture, routed, report)
        for _ in mixture:
            self._step(f"{name}: weights")
        self.workers.share(layer)
        if hidden is not None and reference is not None:
            self.store.before_advance()
            output = hidden.advance(layer, lambda: self._step(f"{name}: outputs"))
            check_activations(output, f"Layer {index}, output")
            report.output_snr_db = _snr_db(reference, output)
        _restore_dtypes(layer, dtypes)
        check_result(layer, self.family.layer_name(index))
        layer.to("cpu")
        report.seconds = time.perf_counter() - started
        self.report.layers.append(report)

    def _quantize_input(
        self, layer: nn.Module, entry: LinearInput, statistics: InputSummary | None, report: LayerReport
    ) -> None:
        how = treatment(self.recipe, self.family.layer_name(report.index), entry)
        absmax = None if statistics is None else statistics.absmax
        if absmax is not None:
            check_activations(absmax, f"Layer {report.index}, input '{entry.path}'")
        parent = layer.get_submodule(entry.parent)
        originals = [getattr(parent, name) for name in how.linears]
        replaced = quantize_input_modules(layer, entry, how, self.rotations)
        if not replaced:
            return
        weight = torch.cat([linear.weight.detach() for linear in originals])
        biases = [linear.bias for linear in originals]
        del originals  # The copy is enough.
        quantizer: Any = getattr(parent, entry.quantizer_name)
        hessian = None
        if statistics is not None and statistics.hessian is not None:
            hessian = statistics.hessian.matrix()
        del statistics  # The matrix is enough: there is room for one of them on a GPU.
        if quantizer.scheme.stores_order and absmax is not None:
            order = absmax.argsort(stable=True)
            quantizer.channel_order.copy_(order)
            weight = weight[:, order]
            hessian = None if hessian is None else permuted(hessian, order)
        quantized = quantize_weight(weight, how.weights, hessian)
        quantized.store(list(replaced.values()))
        snr_db = None if hessian is None else output_snr_db(weight, quantized.values(), hessian)
        if snr_db is not None:
            report.weight_snr_db[entry.path] = snr_db
        for linear, bias in zip(replaced.values(), biases, strict=True):
            if bias is not None and linear.bias is not None:
                linear.bias.copy_(bias.detach())
        quantizer.to(self.device)
        for linear in replaced.values():
            linear.to(self.device)
        if quantized.fell_back:
            report.fallbacks.append(entry.path)
            self._warn_of_fallback(f"Layer {report.index}, input '{entry.path}'")

    def _quantize_head(self, hidden: HiddenStates | None) -> None:
        hessian = None
        if needs_head_hessian(self.recipe) and not head_is_kept(self.recipe, self.family):
            if self.stored is not None:
                basis = InputBasis.of_head(self.rotations, affine_of_head(self.model, self.family))
                hessian = self.stored.head_hessian(basis, device=self.device)
            elif hidden is not None:
                hessian = head_hessian(self.model, self.family, hidden, self.device)
        if not quantize_head(self.model, self.family, self.recipe, hessian, self.device):
            self.report.head_fell_back = True
            self._warn_of_fallback(f"The output head '{self.family.head}'")

    @staticmethod
    def _warn_of_fallback(what: str) -> None:
        warnings.warn(
            f"{what}: the Hessian could not be factored (it is zero or not finite, or 1000 times the damping"
            " did not help); its weights were rounded to nearest.",
            stacklevel=2,
        )

    def _quantize_experts(
        self,
        layer: nn.Module,
        mixture: tuple[LinearInput, ...],
        routed: RoutedTokens | None,
        report: LayerReport,
    ) -> None:
        name = self.family.layer_name(report.index)
        treatments = {entry: treatment(self.recipe, name, entry) for entry in mixture}
        done = quantize_experts(layer, treatments, self.rotations, routed, self.device, self.hessian_bytes)
        report.undersampled_experts = done.undersampled
        report.fallbacks += done.fallbacks
        for message in done.messages(report.index):
            warnings.warn(message, stacklevel=2)

    def _key_bits(self) -> list[int]:
        """Key bits of each layer; the layers the 4-bit cache hurts most get 8 if the recipe grants it."""
        cache = self.recipe.kv_cache
        if cache is None:
            return []
        bits: list[int] = [cache.keys.bits] * len(self.layers)
        self.report.sensitive_layers = sensitive_layers(cache, self.report.layers)
        for index in self.report.sensitive_layers:
            bits[index] = SENSITIVE_KEY_BITS
            attention: Any = self.layers[index].get_submodule(self.family.attention)
            # A layer that an earlier run finished has none here; a checkpoint says it by the list of bits.
            if hasattr(attention, "kv_quantizer"):
                attention.kv_quantizer.keys.set_bits(SENSITIVE_KEY_BITS)
        return bits

    def _name(self, index: int) -> str:
        return f"layer {index + 1}/{len(self.layers)}"

    def _step(self, text: str) -> None:
        self.steps += 1
        self.progress(self.steps, self.total_steps, text)


def _snr_db(reference: Tensor, output: Tensor) -> float:
    noise = (output - reference).double().square().sum().clamp_min(1e-30)
    return float(10 * torch.log10(reference.double().square().sum().clamp_min(1e-30) / noise))


def _restore_dtypes(layer: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Cast what is left in full precision (norms, biases) back to what it was."""
    fallback = next(iter(dtypes.values()))
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.data = parameter.data.to(dtypes.get(name, fallback))
        for module in layer.modules():
            if isinstance(module, QuantizedLinear) and module.bias is not None:
                module.bias = module.bias.to(fallback)
