"""Norms and gates of vLLM's models that quantize what they compute: one kernel in the place of two.

A norm's forward pass gives its linear integers instead of a tensor. It may only where nothing else reads that
tensor, which is found by trying: the forward passes of the decoder layer and of the linear's parent run with
stand-ins for what they call, and with an object in the tensor's place that has no use but to be handed on.
Everything else keeps vLLM's way.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import vllm.envs
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.linear import LinearBase

from .. import kernels
from ..runtime.modules.input import InputQuantizer
from .linear import QuantizedRows, RRSQLinearMethod

__all__ = ["GateForward", "NormForward", "fuse"]


def fuse(layers: nn.Module, vllm_config: VllmConfig) -> None:
    """Let the norms and gates of decoder layers quantize, where their one reader is a linear of rrsq's.

    Nothing is changed where adapters may take the places of linears. Norms are left alone where all processes
    sum what they normalize and vLLM has a kernel for both, and where a token's bits must not depend on how
    many others there are: the order of a norm's sum does.

    Args:
        layers: the decoder layers of this process.
        vllm_config: of the engine.
    """
    if vllm_config.lora_config is not None:
        return
    passes = vllm_config.compilation_config.pass_config
    plain_norms = vllm.envs.VLLM_BATCH_INVARIANT or passes.fuse_allreduce_rms or passes.enable_sp
    for layer in layers.children():
        modules = dict(layer.named_modules())
        for path, linear in modules.items():
            if not _takes_quantized(linear):
                continue
            parent, _, name = path.rpartition(".")
            norm = linear.quant_method.place.entry.norm
            if norm is None:
                _fuse_gate(modules[parent], name, linear.input_quantizer)
            elif not plain_norms and _only_reader(layer, norm, parent, name):
                _fuse_norm(modules[norm], linear.input_quantizer)


def _takes_quantized(linear: Any) -> bool:
    """Whether a linear reads nothing but integers that a norm or a gate can make."""
    return (
        isinstance(linear, LinearBase)
        and isinstance(linear.quant_method, RRSQLinearMethod)
        and linear.input_quantizer.takes_deferred
        and all(quantized for quantized, _ in linear.row_runs)
        and getattr(linear, "input_is_parallel", True)
    )


class NormForward:
    """The forward pass of a norm that quantizes.

    The sum with the residual is rounded before it is normalized, and what is normalized before it is
    quantized, as transformers does; vLLM's formula normalizes the sum in float32.

    Args:
        norm: the norm.
        eps, offset, late: see :func:`rrsq.kernels.rms_norm`.
        quantizer: of the linear that reads the result.
    """

    def __init__(
        self, norm: nn.Module, eps: float, offset: float, late: bool, quantizer: InputQuantizer
    ) -> None:
        self.norm = norm
        self.arguments = eps, offset, late
        self.quantizer = quantizer

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """``[tokens, channels]`` normalized and quantized; with a residual, that and the sum."""
        weight: Any = self.norm.weight
        if x.dtype != weight.dtype:
            return type(self.norm).forward(self.norm, x, residual)
        if residual is None:
            operand, scale = self.quantizer.computed_by(
                kernels.rms_norm_quantize, (x, weight.data), self.arguments
            )
            return QuantizedRows(operand, scale, x.dtype)
        operand, scale, total = self.quantizer.computed_by(
            kernels.add_rms_norm_quantize, (x, residual, weight.data), self.arguments
        )
        return QuantizedRows(operand, scale, x.dtype), total


class GateForward:
    """The forward pass of an activation of gates, times ups, that quantizes.

    Args:
        activation: a name in :data:`rrsq.kernels.gated_quantize.GATES`.
        quantizer: of the linear that reads the result.
    """

    def __init__(self, activation: str, quantizer: InputQuantizer) -> None:
        self.activation = activation
        self.quantizer = quantizer

    def __call__(self, x: Tensor) -> QuantizedRows:
        """Gates and ups side by side, ``[tokens, 2 * channels]``, to quantized ``[tokens, channels]``."""
        operand, scale = self.quantizer.computed_by(kernels.gated_quantize, (x,), (self.activation,))
        return QuantizedRows(operand, scale, x.dtype)


def _fuse_norm(norm: Any, quantizer: InputQuantizer) -> None:
    # Of these classes alone: another of that name may compute otherwise.
    if type(norm) is RMSNorm and norm.has_weight and norm.variance_size_override is None:
        norm.forward = NormForward(norm, norm.variance_epsilon, 0.0, False, quantizer)
    elif type(norm) is GemmaRMSNorm:
        norm.forward = NormForward(norm, norm.variance_epsilon, 1.0, True, quantizer)


def _fuse_gate(parent: nn.Module, linear: str, quantizer: InputQuantizer) -> None:
    for name, child in list(parent.named_children()):
        activation = _activation(child)
        if activation is not None and _readers(parent, name, (_stream(),), {}) == [linear]:
            own = copy.copy(child)  # vLLM may give all layers, and other models, the same one.
            own.forward = GateForward(activation, quantizer)
            setattr(parent, name, own)


def _activation(module: Any) -> str | None:
    if type(module) is SiluAndMul:
        return "silu"
    return "gelu_tanh" if type(module) is GeluAndMul and module.approximate == "tanh" else None


class _Marker:
    """In the place of a tensor: whatever looks at it fails."""


_MARKER = _Marker()
_TOKENS, _CHANNELS = 3, 8


def _stream() -> Tensor:
    return torch.empty(_TOKENS, _CHANNELS, device="meta")


class _Probe:
    """Stands for a module in its own forward pass, and notes which of its children get the marker.

    Args:
        module: the module.
        source: the child whose result is the marker.

    Attributes:
        given: children that got it, each with the arguments of the call.
    """

    def __init__(self, module: nn.Module, source: str | None) -> None:
        self.module = module
        self.source = source
        self.given: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        child = self.module._modules.get(name)
        return getattr(self.module, name) if child is None else functools.partial(self._call, name, child)

    def _call(self, name: str, child: Any, *args: Any, **kwargs: Any) -> Any:
        if any(x is _MARKER for x in (*args, *kwargs.values())):
            self.given.append((name, args, kwargs))
        if isinstance(child, LinearBase):
            rows = getattr(child, "output_size_per_partition", child.output_size)
            return torch.empty(_TOKENS, rows, device="meta"), None
        if name == "rotary_emb":  # Of positions, queries and keys.
            return args[1:]
        first = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if name == self.source:
            first = _MARKER
        elif first is _MARKER:
            first = _stream()
        with_residual = isinstance(child, RMSNorm | GemmaRMSNorm) and len(args) > 1
        return (first, *args[1:]) if with_residual else first


def _readers(module: nn.Module, source: str | None, args: tuple[Any, ...], kwargs: Any) -> list[str] | None:
    probe = _probed(module, source, args, kwargs)
    return None if probe is None else [name for name, _, _ in probe.given]


def _probed(module: nn.Module, source: str | None, args: tuple[Any, ...], kwargs: Any) -> _Probe | None:
    """A module after its forward pass; None where it failed, or the marker came out of it."""
    probe = _Probe(module, source)
    try:
        result = type(module).forward(probe, *args, **kwargs)
    except Exception:  # Whatever the module's code finds missing.
        return None
    results = result if isinstance(result, tuple) else (result,)
    return None if any(x is _MARKER for x in results) else probe


def _only_reader(layer: nn.Module, norm: str, parent: str, linear: str) -> bool:
    """Whether a norm's result goes from the layer to a linear's parent, then to it, and nowhere else."""
    for arguments in _layer_arguments(layer):
        probe = _probed(layer, norm, (), arguments)
        if probe is None or [name for name, _, _ in probe.given] != [parent]:
            return False
        _, args, kwargs = probe.given[0]
        if _readers(layer.get_submodule(parent), None, args, kwargs) != [linear]:
            return False
    return True


def _layer_arguments(layer: nn.Module) -> Iterator[dict[str, Any]]:
    """Those of a layer's forward pass, without a residual and, where it takes one, with it."""
    positions = torch.empty(_TOKENS, dtype=torch.int64, device="meta")
    arguments = {"positions": positions, "hidden_states": _stream()}
    if "residual" in inspect.signature(type(layer).forward).parameters:
        yield {**arguments, "residual": None}
        arguments["residual"] = _stream()
    yield arguments
