"""Inputs of linears that do not exist yet: who quantizes them computes them in the same kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ...kernels.operation import Operation, forced_backend
from .gradient import needs_gradient

__all__ = ["DeferredInput", "fuses"]


def fuses(x: Tensor) -> bool:
    """Whether what works on ``x`` is to be few kernels: on a GPU, where nothing is traced or trained."""
    if is_compiling() or needs_gradient(x):  # First: what is traced cannot ask for the backend.
        return False
    backend = forced_backend()
    return (x.is_cuda and backend != "eager") or backend == "triton"


class DeferredInput:
    """What a norm or a gate would have given to the linears behind it.

    It stands for a tensor between two modules that know of each other. Whoever else gets hold of it may treat
    it as that tensor, which is then computed.

    Args:
        operation: what computes and quantizes it: called with ``activations``, ``arguments``, and bits, group
            size and block of the rotation, see :func:`rrsq.kernels.quantize_signed`.
        activations: tensors, the first ``[tokens, ...]``.
        arguments: constants.
        make: computes the tensor itself.
        shape: of the tensor; it has dtype and device of the first of ``activations``.

    Attributes:
        others: what the operation has computed beside operand and scale, once it ran.
    """

    requires_grad = False

    def __init__(
        self,
        operation: Operation[..., Any],
        activations: tuple[Tensor, ...],
        arguments: tuple[Any, ...],
        make: Callable[[], Tensor],
        shape: torch.Size,
    ) -> None:
        self.operation = operation
        self.activations = activations
        self.arguments = arguments
        self.shape = shape
        self.dtype = activations[0].dtype
        self.device = activations[0].device
        self.is_cuda = activations[0].is_cuda
        self.others: tuple[Tensor, ...] = ()
        self._make = make
        self._tensor: Tensor | None = None

    def tensor(self) -> Tensor:
        """The tensor, computed at the first call."""
        if self._tensor is None:
            self._tensor = self._make()
        return self._tensor

    def size(self, *dimension: int) -> Any:
        """The tensor's shape, as a tensor says it."""
        return self.shape[dimension[0]] if dimension else self.shape

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args = [x.tensor() if isinstance(x, DeferredInput) else x for x in args]
        kwargs = {k: x.tensor() if isinstance(x, DeferredInput) else x for k, x in (kwargs or {}).items()}
        return function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.tensor()[index]
