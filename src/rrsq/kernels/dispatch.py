"""Choosing a kernel: implementations declare their constraints as data, the best capable one is taken.

A :class:`Kernel` is one implementation of an operation (``linear_folded``, say) by a backend (``eager`` or
``triton``). Its :class:`Constraints` say what it can serve. :func:`select` takes the capable kernel of the
highest priority; :func:`explain` lists all candidates with the reasons against them. The environment variable
``RRSQ_KERNELS`` (``eager`` or ``triton``) or the context manager :func:`use_kernels` restrict the choice to
one backend.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from rrsq.errors import KernelUnavailableError

from .operation import BACKENDS, forced_backend, use_kernels

__all__ = [
    "BACKENDS",
    "Call",
    "Candidate",
    "Constraints",
    "Kernel",
    "explain",
    "forced_backend",
    "kernels_of",
    "operations",
    "register",
    "resolve",
    "select",
    "use_kernels",
]

_ENVIRONMENT_VARIABLE = "RRSQ_KERNELS"


@dataclass(frozen=True)
class Call:
    """What a dispatch decision may depend on: never the values in a tensor.

    ``dtypes`` and ``sizes`` are tuples of (name, value) pairs so that a call can be a dictionary key.
    """

    operation: str
    device: torch.device
    dtypes: tuple[tuple[str, torch.dtype], ...] = ()
    sizes: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Constraints:
    """What an implementation can serve, as data. An absent name constrains nothing."""

    device_types: frozenset[str] | None = None
    """Device types it runs on; None: any."""
    minimum_capability: tuple[int, int] | None = None
    """Least CUDA compute capability."""
    modules: tuple[str, ...] = ()
    """Python packages that must be installed."""
    dtypes: Mapping[str, frozenset[torch.dtype]] = field(default_factory=dict)
    """Allowed dtypes by argument name."""
    divisible: Mapping[str, int] = field(default_factory=dict)
    """A size that must be a multiple of a number."""
    at_least: Mapping[str, int] = field(default_factory=dict)
    at_most: Mapping[str, int] = field(default_factory=dict)
    power_of_two: frozenset[str] = frozenset()
    """Sizes that must be powers of two."""

    def violations(self, call: Call) -> list[str]:
        """Return why ``call`` cannot be served, one phrase a reason; empty when it can."""
        return [*self._device_violations(call), *self._argument_violations(call)]

    def _device_violations(self, call: Call) -> Iterator[str]:
        device = call.device
        for module in self.modules:
            if not _installed(module):
                yield f"the package {module} is not installed"
        if self.device_types is not None and device.type not in self.device_types:
            allowed = " or ".join(sorted(self.device_types))
            if not (device.type == "cpu" and "triton" in self.modules and _interpreted()):
                yield f"runs on {allowed}, not on {device.type}"
        elif self.minimum_capability is not None and device.type == "cuda":
            capability = _capability(device.index or 0)
            if capability < self.minimum_capability:
                need = ".".join(map(str, self.minimum_capability))
                yield f"needs compute capability {need}, this device has {capability[0]}.{capability[1]}"

    def _argument_violations(self, call: Call) -> Iterator[str]:
        for name, dtype in call.dtypes:
            if name in self.dtypes and dtype not in self.dtypes[name]:
                yield f"{name} of {dtype} is not supported"
        for name, size in call.sizes:
            if size % self.divisible.get(name, 1):
                yield f"{name} = {size} is not a multiple of {self.divisible[name]}"
            if size < self.at_least.get(name, size):
                yield f"{name} = {size} is less than {self.at_least[name]}"
            if size > self.at_most.get(name, size):
                yield f"{name} = {size} is more than {self.at_most[name]}"
            if name in self.power_of_two and size & (size - 1):
                yield f"{name} = {size} is not a power of two"


@dataclass(frozen=True)
class Kernel:
    """One implementation of an operation."""

    operation: str
    name: str
    backend: str
    target: str
    """``module:function``, imported when it is first chosen."""
    constraints: Constraints
    priority: int
    """The capable kernel of the highest priority is chosen."""

    def load(self) -> Callable[..., Any]:
        """Import and return the function."""
        return _load(self.target)


@dataclass(frozen=True)
class Candidate:
    """A kernel and why it cannot serve a call; no reasons: it can."""

    kernel: Kernel
    reasons: tuple[str, ...]


_registry: dict[str, list[Kernel]] = {}


def register(kernel: Kernel) -> None:
    """Add an implementation; the candidates of an operation are kept in order of priority."""
    entries = _registry.setdefault(kernel.operation, [])
    entries.append(kernel)
    entries.sort(key=lambda entry: -entry.priority)
    _choose.cache_clear()


def operations() -> list[str]:
    """Names of all operations."""
    return sorted(_registry)


def kernels_of(operation: str) -> list[Kernel]:
    """All implementations of an operation, best first."""
    return list(_registry[operation])


def explain(call: Call, backend: str | None = None) -> list[Candidate]:
    """All candidates for ``call``, best first, each with the reasons against it."""
    return [
        Candidate(kernel, tuple(_backend_reason(kernel, call, backend) + kernel.constraints.violations(call)))
        for kernel in _registry[call.operation]
    ]


def _backend_reason(kernel: Kernel, call: Call, backend: str | None) -> list[str]:
    if backend is not None and kernel.backend != backend:
        return [f"the backend {backend} was asked for"]
    if backend is None and kernel.backend == "triton" and call.device.type == "cpu":
        return ["on a CPU the interpreter only runs when asked for"]
    return []


@functools.lru_cache(maxsize=4096)
def _choose(call: Call, backend: str | None) -> Kernel:
    candidates = explain(call, backend)
    for candidate in candidates:
        if not candidate.reasons:
            return candidate.kernel
    listing = "\n".join(f"  {c.kernel.name}: {'; '.join(c.reasons)}" for c in candidates)
    sizes = ", ".join(f"{name} {value}" for name, value in (*call.dtypes, *call.sizes))
    raise KernelUnavailableError(
        f"no kernel for {call.operation} on {call.device} ({sizes}):\n{listing}\n"
        f"Unset {_ENVIRONMENT_VARIABLE} or use another device, dtype or group size."
    )


def select(call: Call) -> Kernel:
    """Choose the kernel for ``call``.

    Raises:
        KernelUnavailableError: nothing fits; the message lists every candidate with its reasons.
    """
    return _choose(call, forced_backend())


def resolve(call: Call) -> Callable[..., Any]:
    """Choose the kernel for ``call`` and import its function."""
    return select(call).load()


@functools.cache
def _load(target: str) -> Callable[..., Any]:
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)


@functools.cache
def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
