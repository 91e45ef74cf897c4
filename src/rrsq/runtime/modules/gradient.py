"""Gradients through quantized products, for adapters that are trained beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["StraightThrough", "needs_gradient"]


def needs_gradient(x: Tensor) -> bool:
    """Whether something before ``x`` is being trained."""
    return x.requires_grad and torch.is_grad_enabled()


class StraightThrough(torch.autograd.Function):
    """A quantized product, differentiated as the product it stands for: ``dL/dx = dL/dy Ŵ``.

    Rounding has no useful gradient and is passed straight through (arXiv 1308.3432). Quantized weights are
    frozen: they are integers.

    Called with ``x``, the product ``x`` to ``y``, and what makes ``dL/dx`` of ``dL/dy``.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, product: Callable[[Tensor], Tensor], gradient: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.gradient, ctx.dtype = gradient, x.dtype
        return product(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.gradient(grad).to(ctx.dtype), None, None
