"""What each choice costs at each input: the divergence of the next token that it alone is expected to cause.

An error ``e_t`` that quantization adds to the outputs of some linears at token t changes the distributions of
the tokens that follow. To second order the Kullback-Leibler divergence, summed over the text, is ``½ eᵀ F e``
with F the Fisher information of those outputs, ``F = E[g gᵀ]``, where g is the gradient of the log likelihood
of a text drawn from the model itself. One token is drawn at each place, one backward pass gives all ``g_t``,
and errors of different tokens are taken as independent::

    loss = ½ mean_t (g_t · e_t)²        nats a token

A token that everything depends on has a large gradient, however few such tokens there are; a mean of squared
errors would hide it. Weights are rounded to nearest for this, not by GPTQ, so that their losses are all too
large. The head's losses are not estimated: its logits are computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from ...errors import NonFiniteError
from ...models import LinearInput, ModelFamily
from ...recipe import Embedding, Recipe, Weights
from ...runtime.assemble import key_rotary, treated_inputs
from ...runtime.modules.embedding import block_rotation
from ...runtime.modules.input import InputQuantizer
from ...runtime.modules.int8_linear import Int8Linear
from ...runtime.modules.rotation import RotatedLinear, online_rotation
from ...runtime.rotation.rotations import Rotations, make_rotations
from ...runtime.scheme import group_size_for, input_scheme
from ..calibration.precision import calibration_products
from ..calibration.stream import HiddenStates
from ..fold.blocks import rotate_in_blocks
from ..fold.rotations import fold_embedding, fold_head, fold_layer, untie_head
from ..grid import choose_grid, round_to_grid
from ..observe import measure_layer
from .choices import InputChoices, ModelChoices

__all__ = ["InputLosses", "Losses", "measure_losses"]

Fill = Callable[[str, nn.Module], None]
Step = Callable[[int, int, str], None]

_LOGITS = 2**25
"""Logits that are computed at once."""
_TOKENS = 2048
"""Tokens of a backward pass, or one window."""


class InputLosses(BaseModel):
    """The loss of each choice of :class:`~.choices.InputChoices`, in its order, nats a token."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: int
    path: str
    weights: tuple[float, ...]
    activations: tuple[float, ...]


class Losses(BaseModel):
    """What was measured of a model: its inputs, and its head for each of the bits it may have."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int
    inputs: tuple[InputLosses, ...]
    head: tuple[float, ...]


def measure_losses(
    model: Any,
    family: ModelFamily,
    recipe: Recipe,
    windows: Tensor,
    choices: ModelChoices,
    fill: Fill,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    on_step: Step = lambda done, total, text: None,
) -> Losses:
    """Measure what each choice costs.

    Each layer is on the device twice: to bring it to the form in which it would be quantized and pass the
    text on, and, from the last to the first, for the gradients. The model is used up.

    Args:
        model: of transformers, dense; its modules are given their weights by ``fill``.
        family: of it.
        recipe: whose rotations and methods hold.
        windows: int64 ``[samples, tokens]``.
        choices: of this model and recipe.
        fill: called with a module's path and the module before it is used.
        seed: of the rotations' signs and of the tokens that are drawn.
        device: where to compute.
        on_step: called with steps done, steps in all, and what is done.

    Raises:
        NonFiniteError: a gradient or an error is NaN or infinite.
    """
    model.eval().requires_grad_(False)
    run = _Measurement(model, family, recipe, choices, seed, torch.device(device))
    return run.execute(windows, fill, on_step)


class _Measurement:
    """The state that the two passes share."""

    def __init__(
        self,
        model: Any,
        family: ModelFamily,
        recipe: Recipe,
        choices: ModelChoices,
        seed: int,
        device: torch.device,
    ) -> None:
        self.model = model
        self.family = family
        self.recipe = recipe
        self.choices = choices
        self.device = device
        self.sizes = family.sizes(model.config)
        self.rotations: Rotations = make_rotations(
            recipe.rotation, self.sizes, seed, folds_residual=family.folds_residual
        )
        self.layers: Any = model.get_submodule(family.layers)
        self.generator = torch.Generator().manual_seed(seed)
        self.largest: dict[tuple[int, str], Tensor] = {}

    def execute(self, windows: Tensor, fill: Fill, on_step: Step) -> Losses:
        model, family = self.model, self.family
        total = 2 * len(self.layers) + 1
        for path in (family.embedding, family.positions, family.final_norm, family.head):
            if path is not None:
                fill(path, model.get_submodule(path))
        if self.rotations.residual is not None:
            untie_head(model, family)
        fold_embedding(model, family, self.rotations)
        fold_head(model, family, self.rotations)
        hidden = HiddenStates(
            model, family, windows, self.device, max(_TOKENS, windows.shape[1]), dtype=torch.bfloat16
        )
        streams = []
        for index, layer in enumerate(self.layers):
            on_step(index, total, f"layer {index + 1}/{len(self.layers)}: forward")
            fill(family.layer_name(index), layer)
            streams.append(hidden.stream.clone())
            self._prepare(index, layer, hidden)
        on_step(len(self.layers), total, "output head")
        gradient, head = self._measure_head(hidden)
        inputs: list[InputLosses] = []
        for index in reversed(range(len(self.layers))):
            done = 2 * len(self.layers) - index
            on_step(done, total, f"layer {index + 1}/{len(self.layers)}: backward")
            hidden.stream.copy_(streams.pop())
            inputs = self._measure_layer(index, hidden, gradient) + inputs
            self.layers[index].to("meta")
        on_step(total, total, "sensitivities")
        losses = Losses(tokens=windows.numel(), inputs=tuple(inputs), head=head)
        for each in losses.inputs:
            _check(torch.tensor((*each.weights, *each.activations)), f"Layer {each.layer}, '{each.path}'")
        return losses

    def _prepare(self, index: int, layer: nn.Module, hidden: HiddenStates) -> None:
        """Rotate and balance a layer as its quantization would, and run the text through it."""
        family, recipe = self.family, self.recipe
        dtypes = {name: parameter.dtype for name, parameter in layer.named_parameters()}
        inputs = treated_inputs(layer, family, recipe)
        layer.to(device=self.device, dtype=torch.float32)
        if recipe.rotation is not None:
            fold_layer(layer, family, self.rotations, self.sizes)
        known = measure_layer(
            layer,
            inputs,
            layer.get_submodule(family.attention),
            key_rotary(self.model, family, index),
            hidden,
            recipe,
            self.device,
            lambda: None,
        )
        for path, summary in known.statistics.inputs.items():
            if summary.absmax is not None:
                self.largest[index, path] = summary.absmax
        if recipe.rotation is not None and self.rotations.blocks is not None:
            rotate_in_blocks(
                layer, family, self.rotations, known.statistics, None, balance=recipe.rotation.balance
            )
        hidden.advance(layer)
        layer.to(device="cpu", dtype=next(iter(dtypes.values())))

    def _measure_head(self, hidden: HiddenStates) -> tuple[Tensor, tuple[float, ...]]:
        """The gradients at the last layer's output, ``[samples, tokens, hidden]``, and the head's losses."""
        family = self.family
        norm: Any = self.model.get_submodule(family.final_norm).to(self.device, torch.float32)
        head: Any = self.model.get_submodule(family.head).to(self.device, torch.float32)
        variants = [self._head_weight(head.weight, bits) for bits in self.choices.head_bits]
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        scale = getattr(self.model.config.get_text_config(), "logits_scaling", None)

        def log_probabilities(x: Tensor, weight: Tensor) -> Tensor:
            logits = nn.functional.linear(x, weight, head.bias)
            if scale:
                logits = logits / scale
            return (torch.tanh(logits / cap) * cap if cap else logits).log_softmax(-1)

        gradient = torch.empty_like(hidden.stream, dtype=torch.float32)
        losses = torch.zeros(len(variants), dtype=torch.float64)
        rows, into = hidden.stream.flatten(0, 1), gradient.flatten(0, 1)
        size = max(_LOGITS // head.weight.shape[0], 1)
        for stream, place in zip(rows.split(size), into.split(size), strict=True):
            x = hidden.on_device(stream).requires_grad_()
            normed = norm(x)
            exact = log_probabilities(normed, head.weight)
            chances = exact.detach().exp()
            drawn = torch.multinomial(chances.cpu(), 1, generator=self.generator).to(self.device)
            exact.gather(-1, drawn).sum().backward()
            place.copy_(x.grad)
            with torch.inference_mode():
                for number, weight in enumerate(variants):
                    if weight is not None:
                        other = log_probabilities(normed.detach(), weight)
                        losses[number] += (chances * (exact.detach() - other)).sum().double().cpu()
        for module in (norm, head):
            module.to("meta")  # There is room for a layer then.
        _check(gradient, "The output head")
        return gradient, tuple((losses / len(rows)).clamp_min(0).tolist())

    def _head_weight(self, weight: Tensor, bits: int) -> Tensor | None:
        """A head's weights by what the recipe says, rounded to nearest; None where they stay in 16 bits."""
        rows, channels = weight.shape
        tied_to = self.choices.tied_to
        if bits == 16 and tied_to is not None:
            bits = tied_to.bits
            if bits == 4:
                return _rounded_embedding(weight, tied_to)
        if bits == 16:
            return None
        if bits == 4:
            return _rounded(weight, self.recipe.weights, channels)
        int8 = Int8Linear(channels, rows, bias=False, dtype=torch.float32).to(weight.device)
        int8.set_weight(weight)
        return int8.weight_int8 * int8.weight_scale.unsqueeze(1)

    def _measure_layer(self, index: int, hidden: HiddenStates, gradient: Tensor) -> list[InputLosses]:
        """The losses of a layer's inputs; ``gradient`` becomes that at its input."""
        layer = self.layers[index].to(device=self.device, dtype=torch.float32)
        choices = [each for each in self.choices.inputs if each.layer == index]
        entries = {entry.path: entry for entry in self.family.inputs_in(layer)}
        gauges = [
            _Gauge(layer, entries[each.path], each, self.rotations, self.largest.get((index, each.path)))
            for each in choices
        ]
        samples = hidden.batches[0].shape[0]
        with calibration_products(self.device):
            for batch, at in zip(hidden.batches, gradient.split(samples), strict=True):
                x = hidden.on_device(batch).requires_grad_()
                with torch.enable_grad():
                    output = hidden.call(layer, x)
                output.backward(at.to(self.device))
                # First: the last linear's gradients may be the same memory as those at the layer's output.
                for gauge in gauges:
                    gauge.take()
                at.copy_(x.grad)
        for gauge in gauges:
            gauge.close()
        _check(gradient, f"Layer {index}")
        return [gauge.losses() for gauge in gauges]


class _Gauge:
    """Stands at the linears of one input and adds up the losses of its choices."""

    def __init__(
        self,
        layer: nn.Module,
        entry: LinearInput,
        choices: InputChoices,
        rotations: Rotations,
        largest: Tensor | None,
    ) -> None:
        parent: Any = layer.get_submodule(entry.parent)
        self.choices = choices
        self.linears: list[Any] = [getattr(parent, name) for name in choices.linears]
        self.tokens = 0
        self.given: Tensor | None = None
        self.gradients: dict[int, Tensor] = {}
        weight = torch.cat([linear.weight for linear in self.linears])
        self.weight = weight
        with torch.inference_mode():
            self.errors = [
                None if section.bits == 16 else _rounded(weight, section, choices.channels) - weight
                for section in choices.weights
            ]
        rotation = online_rotation(entry, rotations, choices.channels)
        self.quantizers = []
        for section in choices.activations:
            if rotations.blocks is not None and section.bits != 16:
                section = section.model_copy(update={"signed": True})
            quantizer = InputQuantizer(input_scheme(section, entry, choices.channels), rotation)
            if quantizer.channel_order is not None and largest is not None:
                quantizer.channel_order.copy_(largest.argsort(stable=True))
            self.quantizers.append(quantizer.to(weight.device))
        self.weights = torch.zeros(len(choices.weights), dtype=torch.float64)
        self.activations = torch.zeros(len(choices.activations), dtype=torch.float64)
        self.handles = [
            linear.register_forward_hook(self._hook(number)) for number, linear in enumerate(self.linears)
        ]

    def _hook(self, number: int) -> Callable[..., None]:
        def hook(linear: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.given = args[0].detach()
            output.register_hook(lambda gradient: self.gradients.update({number: gradient.detach()}))

        return hook

    def take(self) -> None:
        """Add what the last forward and backward pass showed."""
        assert self.given is not None
        given = self.given.flatten(0, -2).float()
        gradient = torch.cat(
            [self.gradients[number].flatten(0, -2) for number in range(len(self.linears))], 1
        ).float()
        with torch.inference_mode():
            first = self.linears[0]
            read = first.rotation(given) if isinstance(first, RotatedLinear) else given
            for number, error in enumerate(self.errors):
                if error is not None:
                    self.weights[number] += _squares((read @ error.t()).mul_(gradient))
            behind = gradient @ self.weight
            for number, quantizer in enumerate(self.quantizers):
                if quantizer.scheme.bits != 16:
                    self.activations[number] += _squares((quantizer.simulate(given) - read).mul_(behind))
        self.tokens += len(given)
        self.given = None
        self.gradients.clear()

    def losses(self) -> InputLosses:
        """In nats a token."""
        return InputLosses(
            layer=self.choices.layer,
            path=self.choices.path,
            weights=tuple((0.5 * self.weights / self.tokens).tolist()),
            activations=tuple((0.5 * self.activations / self.tokens).tolist()),
        )

    def close(self) -> None:
        """Leave the linears."""
        for handle in self.handles:
            handle.remove()


def _squares(products: Tensor) -> Tensor:
    """Of ``[tokens, n]`` summed over n, squared, summed over the tokens."""
    return products.sum(1, dtype=torch.float64).square().sum().cpu()


def _rounded(weight: Tensor, section: Any, channels: int) -> Tensor:
    """Weights of least rounding error in the grid of a recipe's section."""
    grid = choose_grid(
        weight,
        group_size_for(section.group_size, channels),
        search=section.clip_search,
        signed=section.signed,
    )
    steps = grid.steps(channels)
    return round_to_grid(weight, steps) * steps


def _rounded_embedding(weight: Tensor, section: Embedding) -> Tensor:
    """The rows of an embedding of 4 bits."""
    rotation = block_rotation(weight.shape[1], section.blocks)
    weights = Weights(method="rtn", group_size=section.group_size, signed=True)
    rounded = _rounded(weight if rotation is None else rotation(weight), weights, weight.shape[1])
    return rounded if rotation is None else rotation.inverse(rounded)


def _check(numbers: Tensor, where: str) -> None:
    if not bool(numbers.isfinite().all()):
        raise NonFiniteError(
            f"{where}: NaN or Inf in the gradients on the calibration text. The model's numbers overflow"
            " there: check that the original model gives sensible text, or choose another --calibration-data."
        )
