"""The RMSNorms of a loaded model by one kernel each, where there is one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .. import kernels
from ..kernels import forced_backend
from .modules.gradient import needs_gradient

__all__ = ["NormForward", "use_norm_kernels"]

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

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., channels]`` normalized."""
        if not is_compiling() and not needs_gradient(x) and _has_kernel(x):
            return kernels.rms_norm(x, self.module.weight, *self.arguments)  # type: ignore[arg-type]
        result: Tensor = type(self.module).forward(self.module, x)
        return result


def _has_kernel(x: Tensor) -> bool:
    backend = forced_backend()
    return (x.is_cuda and backend != "eager") or backend == "triton"


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
