"""The RMSNorms of a loaded model by one kernel each, where there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..kernels.operation import forced_backend
from .modules.deferred import DeferredInput, fuses

__all__ = ["NormForward", "use_norm_kernels"]

_Run = Callable[[Tensor, Tensor], Tensor]
_Runs = dict[tuple[torch.device, torch.dtype, str | None], _Run]

_FORMULAS = ((0.0, False), (0.0, True), (1.0, True), (1.0, False))
"""Offset of the gain, and whether it is multiplied before rounding."""


class NormForward:
    """The forward pass of an RMSNorm of transformers: on a GPU in one kernel, elsewhere its own.

    Args:
        module: the norm, with ``weight`` ``[channels]``.
        eps: its epsilon.
        offset, late: see :func:`rrsq.kernels.rms_norm`.
    """

    def __init__(self, module: nn.Module, eps: float, offset: float, late: bool) -> None:
        self.module = module
        self.arguments = eps, offset, late
        self._prepared: _Runs = {}
        self.reader: Callable[[], bool] | None = None
        """Whether what alone reads the result would take it before it is there."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": {}}

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., channels]`` normalized."""
        if self.defers(x):
            return self._deferred(x)  # type: ignore[return-value]
        if fuses(x):
            run = self._prepared.get((x.device, x.dtype, forced_backend())) or self._prepare(x)
            return run(x, self.module.weight)  # type: ignore[arg-type]
        result: Tensor = type(self.module).forward(self.module, x)
        return result

    def _prepare(self, x: Tensor) -> _Run:
        run = kernels.rms_norm.prepare(x, self.module.weight, *self.arguments)
        self._prepared[x.device, x.dtype, forced_backend()] = run
        return run

    def defers(self, x: Tensor) -> bool:
        """Whether the result would be a :class:`~.modules.deferred.DeferredInput`."""
        reader = self.reader
        return reader is not None and fuses(x) and x.dtype == self.module.weight.dtype and reader()

    def added(self, x: Tensor, residual: Tensor) -> tuple[DeferredInput, Callable[[], Tensor]]:
        """What is normalized of ``residual + x``, and what gives the sum once that is quantized."""
        sums: list[Tensor] = []
        pending: DeferredInput | None = None

        def total() -> Tensor:
            nonlocal pending
            if pending is not None:
                others = pending.others
                sums.append(others[0].view_as(x) if others else residual + x)
                pending = None  # It holds this function: without a cycle, tensors go as soon as they can.
            return sums[0]

        pending = deferred = self._deferred_of(
            kernels.add_rms_norm_quantize, x, residual, lambda: self._normed(total()), x.shape
        )
        return deferred, total

    def _deferred(self, x: Tensor) -> DeferredInput:
        return self._deferred_of(kernels.rms_norm_quantize, x, lambda: self._normed(x), x.shape)

    def _deferred_of(self, operation: Any, *parts: Any) -> DeferredInput:
        *rows, make, shape = parts
        weight: Any = self.module.weight
        return DeferredInput(operation, (*rows, weight), self.arguments, make, shape)

    def _normed(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.module.weight, *self.arguments)  # type: ignore[arg-type]


def use_norm_kernels(model: nn.Module) -> None:
    """Give each RMSNorm of a model that one of the known formulas describes a :class:`NormForward`.

    Which formula it is, is found by trying: all bits of a few tokens have to be the same.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if (
            not type(module).__name__.endswith("RMSNorm")
            or not isinstance(weight, Tensor)
            or weight.ndim != 1
        ):
            continue
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if eps is None or weight.device.type == "meta":
            continue
        formula = _formula(module, weight, float(eps))
        if formula is not None:
            module.forward = NormForward(module, float(eps), *formula)


@torch.no_grad()
def _formula(module: Any, weight: Tensor, eps: float) -> tuple[float, bool] | None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, weight.shape[0], generator=generator).to(weight)
    for formula in _FORMULAS:
        if torch.equal(type(module).forward(module, x), kernels.rms_norm.reference(x, weight, eps, *formula)):
            return formula
    return None
