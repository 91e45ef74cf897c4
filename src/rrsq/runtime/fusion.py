"""Few kernels a layer: norms and gates compute where their result is quantized, RoPE is one kernel.

transformers' modules are written for kernels of one operation each. Here their forward passes get stand-ins
that run fewer, larger ones, on a GPU and where a module's own formula is known to be the same: that is found
by trying, not by names. Everything else takes the module's own forward pass: CPUs, ``torch.compile``,
gradients, modules in the place of the linears (adapters), hooks on what would not be called.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .. import kernels
from ..errors import UnsupportedArchitectureError
from ..kernels.gated_quantize import GATES
from ..models import ModelFamily, family_for
from .modules.deferred import DeferredInput, fuses
from .modules.gradient import needs_gradient
from .modules.linear import FusedLinears, Projections, QuantizedLinear
from .norms import NormForward

__all__ = ["GatedForward", "LayerForward", "NormReader", "RotaryForward", "fuse"]


def fuse(model: Any) -> None:
    """Let the layers of a loaded model run few kernels."""
    try:
        family = family_for(model.config)
    except UnsupportedArchitectureError:
        return
    for layer in model.get_submodule(family.layers).children():
        _fuse_norms(layer, family)
        for module in layer.modules():
            gate = _gate_of(module)
            if gate is not None:
                module.forward = GatedForward(module, *gate)
        if _is_pre_norm(layer):
            layer.forward = LayerForward(layer)
        attention: Any = dict(layer.named_modules()).get(family.attention)
        if (
            attention is not None
            and _ROTARY in getattr(type(attention).forward, "__code__", _NO_CODE).co_names
        ):
            attention.forward = RotaryForward(attention)


def _untouched(module: nn.Module) -> bool:
    """Whether calling a module is calling its forward pass, as its class has it, and nothing else."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return not hooks and "forward" not in module.__dict__ and not nn.modules.module._has_any_global_hook()


class NormReader:
    """Whether the linears behind a norm, which alone read its result, can quantize it before it is there.

    Args:
        norm: the norm.
        layer: what holds the linears' parent, as ``name``.
        parent: of the linears.
        linears: what quantizes.
    """

    def __init__(
        self,
        norm: nn.Module,
        layer: nn.Module,
        name: str,
        parent: nn.Module,
        linears: FusedLinears | QuantizedLinear,
    ) -> None:
        self.norm, self.layer, self.name, self.parent, self.linears = norm, layer, name, parent, linears

    def __call__(self) -> bool:
        """Whether they can, as things stand."""
        return (
            not self.norm._forward_hooks
            and not nn.modules.module._has_any_global_hook()
            and self.layer._modules.get(self.name) is self.parent
            and self._takes_deferred(self.linears)
        )

    def _takes_deferred(self, linears: FusedLinears | QuantizedLinear) -> bool:
        if isinstance(linears, FusedLinears):
            return linears.takes_deferred(self.parent)
        return (
            linears.input_quantizer.takes_deferred
            and _untouched(linears)
            and any(module is linears for module in self.parent._modules.values())
            and all(getattr(hook, "leaves_input", False) for hook in self.parent._forward_pre_hooks.values())
        )


def _fuse_norms(layer: nn.Module, family: ModelFamily) -> None:
    entries = family.inputs_in(layer)
    for entry in entries:
        shared = sum(other.norm == entry.norm for other in entries) > 1
        if entry.norm is None or shared or entry.experts or entry.full_precision or "." in entry.parent:
            continue
        norm: Any = layer.get_submodule(entry.norm)
        parent = layer.get_submodule(entry.parent)
        alone = getattr(parent, entry.linears[0]) if len(entry.linears) == 1 else None
        linears = getattr(parent, entry.fused_name, alone)
        if not isinstance(linears, FusedLinears | QuantizedLinear):
            continue
        if isinstance(norm.__dict__.get("forward"), NormForward):
            norm.forward.reader = NormReader(norm, layer, entry.parent, parent, linears)


_APART = "gate_proj", "up_proj", "act_fn", "down_proj"
_JOINED = "gate_up_proj", "activation_fn", "down_proj"
"""Names in an MLP, whose gates and ups are two linears or one."""


class GatedForward:
    """The forward pass of an MLP ``down(activation(gate(x)) * up(x))`` whose gates are quantized at once.

    Args:
        module: the MLP.
        names: those of its parts.
        activation: a name in :data:`rrsq.kernels.gated_quantize.GATES`.
    """

    def __init__(self, module: Any, names: tuple[str, ...], activation: str) -> None:
        self.module = module
        self.names = names
        self.activation = activation
        self.parts = tuple(getattr(module, name) for name in names)

    def __call__(self, x: Any) -> Tensor:
        """``[..., hidden]`` to ``[..., hidden]``."""
        module = self.module
        joined = self._joined(x)
        if joined is None:
            result: Tensor = type(module).forward(module, x)
        else:
            result = module.down_proj(self._deferred(joined))
        return result

    def _joined(self, x: Any) -> Tensor | None:
        """Gates and ups side by side; None where the module's own forward pass is to run."""
        apart = isinstance(x, Projections)
        if apart != (self.names == _APART) or not fuses(x.joined if apart else x) or not self._is_as_it_was():
            return None
        if not apart:
            return self.parts[0](x)
        gate, up = self.parts[:2]
        return x.joined if (gate.place, up.place, len(x.rows)) == (0, 1, 2) else None

    def _is_as_it_was(self) -> bool:
        modules = self.module._modules
        return (
            not self.module.training
            and all(modules.get(name) is part for name, part in zip(self.names, self.parts, strict=True))
            and all(_untouched(part) for part in self.parts)
            and self.parts[-1].input_quantizer.takes_deferred
        )

    def _deferred(self, joined: Tensor) -> DeferredInput:
        def make() -> Tensor:
            gate, up = joined.chunk(2, dim=-1)
            return GATES[self.activation](gate) * up

        shape = torch.Size((*joined.shape[:-1], joined.shape[-1] // 2))
        return DeferredInput(kernels.gated_quantize, (joined,), (self.activation,), make, shape)


@torch.no_grad()
def _gate_of(module: Any) -> tuple[tuple[str, ...], str] | None:
    """Names and activation of an MLP whose forward pass is known, of quantized linears; else None."""
    for names in (_APART, _JOINED):
        parts = [getattr(module, name, None) for name in names]
        if all(isinstance(part, QuantizedLinear) for part in (*parts[:-2], parts[-1])):
            return _try_gate(module, names, parts[-2])
    return None


def _try_gate(module: Any, names: tuple[str, ...], act_fn: Any) -> tuple[tuple[str, ...], str] | None:
    x = torch.linspace(-8.0, 8.0, 61, device="cpu")
    linears = {
        "gate_proj": lambda x: x * 3.0,
        "up_proj": lambda x: x + 5.0,
        "gate_up_proj": lambda x: torch.cat((x * 3.0, x + 5.0), -1),
        "down_proj": lambda x: x - 1.0,
    }
    # The dropout of Seed-OSS: nothing when it is not trained.
    stand_in = SimpleNamespace(**linears, **{names[-2]: act_fn}, training=False, residual_dropout=0.0)
    try:
        activation = next(name for name, formula in GATES.items() if torch.equal(act_fn(x), formula(x)))
        actual = type(module).forward(stand_in, x)
    except Exception:  # Whatever the module's code finds missing.
        return None
    expected = GATES[activation](x * 3.0) * (x + 5.0) - 1.0
    return (names, activation) if isinstance(actual, Tensor) and torch.equal(actual, expected) else None


class LayerForward:
    """The forward pass of a decoder layer with norms in front, with one addition in the norm's kernel.

    Args:
        layer: the layer: ``h = x + attention(norm(x))``, and ``h + mlp(norm'(h))`` is its result.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's result, as its own forward pass gives it."""
        layer = self.layer
        norm = layer.post_attention_layernorm.__dict__.get("forward")
        plain = args or not isinstance(norm, NormForward) or layer.training or not norm.defers(hidden_states)
        if plain or norm.module._forward_pre_hooks:
            return type(layer).forward(layer, hidden_states, *args, **kwargs)
        attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
        normed, total = norm.added(attended, hidden_states)
        result = layer.mlp(normed)
        return total() + result


@torch.no_grad()
def _is_pre_norm(layer: Any) -> bool:
    """Whether the forward pass of a layer is that of :class:`LayerForward`, tried with stand-ins."""
    seen: list[Any] = []

    def attention(**kwargs: Any) -> tuple[Tensor, None]:
        seen.append(kwargs.pop("marker", None))
        return kwargs["hidden_states"] - 3.0, None

    x = torch.linspace(-8.0, 8.0, 61, dtype=torch.float64, device="cpu")
    stand_in = SimpleNamespace(
        input_layernorm=lambda x: x * 0.3,
        self_attn=attention,
        post_attention_layernorm=lambda x: x * x,
        mlp=lambda x: x / 7.0,
        training=False,
        resid_attn_dropout=lambda x: x,  # Of Phi-3: nothing when it is not trained.
        resid_mlp_dropout=lambda x: x,
    )
    try:
        # Without what transformers wraps it in for training.
        actual = inspect.unwrap(type(layer).forward)(stand_in, x, marker="is handed on")
    except Exception:  # Whatever the layer's code finds missing.
        return False
    total = x + (x * 0.3 - 3.0)
    expected = total + total * total / 7.0
    return seen == ["is handed on"] and isinstance(actual, Tensor) and torch.equal(actual, expected)


_ROTARY = "apply_rotary_pos_emb"
_NO_CODE = (lambda: None).__code__


class RotaryForward:
    """The forward pass of an attention with RoPE as one kernel.

    transformers' attentions call a function of their module, for which there is no hook (but with the package
    ``kernels``, and that one is for all models of a process). The forward pass runs with another one of that
    name here, where the function that is there does what :func:`rrsq.kernels.rotary` does.

    Args:
        module: the attention.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._twin: _Twin | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_twin": None}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass."""
        forward: Any = type(self.module).forward
        if not is_compiling():
            own = forward.__globals__.get(_ROTARY)
            if own is not None and _is_rotary(own):
                forward = self._with_kernel(forward, own)
        return forward(self.module, *args, **kwargs)

    def _with_kernel(self, forward: Any, own: Callable[..., Any]) -> Any:
        twin = self._twin
        if twin is None or twin.function is not forward or twin.thing.own is not own:
            twin = self._twin = _Twin(forward, _ROTARY, _Rotary(own))
        return twin.follow()


class _Twin:
    """A function that finds another thing under one global name, and all others as the function itself does.

    Args:
        function: what it does.
        name: of what is another thing.
        thing: that is found there.
    """

    def __init__(self, function: Any, name: str, thing: Any) -> None:
        self.function, self.thing = function, thing
        own = function.__globals__
        self._globals = {key: value for key, value in own.items() if key.startswith("__")}
        self._globals[name] = thing
        self._names = tuple(_names_in(function.__code__) - {name})
        self._made = types.FunctionType(
            function.__code__, self._globals, function.__name__, function.__defaults__, function.__closure__
        )
        self._made.__kwdefaults__ = function.__kwdefaults__

    def follow(self) -> Any:
        """The function, with what stands under its other names now; there are few."""
        own, found = self.function.__globals__, self._globals
        for name in self._names:
            if name in own:
                found[name] = own[name]
        return self._made


def _names_in(code: types.CodeType) -> set[str]:
    inner = (_names_in(part) for part in code.co_consts if isinstance(part, types.CodeType))
    return set(code.co_names).union(*inner)


class _Rotary:
    """In the place of a function that rotates queries and keys."""

    def __init__(self, own: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self.own = own

    def __call__(
        self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        fits = not args and not kwargs and query.ndim == 4 and cos.ndim == 3
        if fits and fuses(query) and not needs_gradient(key):
            return kernels.rotary(query, key, cos, sin)
        return self.own(query, key, cos, sin, *args, **kwargs)


_known: dict[Callable[..., Any], bool] = {}


def _is_rotary(function: Callable[..., Any]) -> bool:
    """Whether a function does what :func:`rrsq.kernels.rotary` does, tried once."""
    known = _known.get(function)
    if known is None:
        known = _known[function] = _try_rotary(function)
    return known


@torch.no_grad()
def _try_rotary(function: Callable[..., Any]) -> bool:
    generator = torch.Generator("cpu").manual_seed(0)
    query, key = (torch.randn(2, heads, 3, 8, generator=generator, device="cpu") for heads in (4, 2))
    # Angles of no pattern: a function that takes only a half of them is another one.
    cos, sin = torch.randn(2, 2, 3, 8, generator=generator, device="cpu")
    try:
        actual = function(query, key, cos, sin)
    except Exception:
        return False
    expected = kernels.rotary.reference(query, key, cos, sin)
    return all(torch.equal(ours, theirs) for ours, theirs in zip(actual, expected, strict=True))
