"""Operations: one definition each, and the choice between their implementations.

An operation is a function with the eager reference as its body, decorated with :func:`operation`, in a file
of its own. Beside it stand what tracing needs (``fake``), what the choice may depend on (``sizes``,
``dtypes``) and its kernels with their constraints::

    @operation(fake=_fake, sizes=_sizes, dtypes=("out_dtype",), typical={"in_features": 4096})
    def linear(x: Tensor, weight: Tensor, out_dtype: torch.dtype) -> Tensor:
        ...

    @linear.kernel("triton", Constraints(device_types=frozenset({"cuda"}), divisible={"in_features": 64}))
    def _launch(x: Tensor, weight: Tensor, out_dtype: torch.dtype) -> Tensor:
        ...

``linear`` is then an :class:`Operation`. Called, it runs the capable kernel of the highest priority,
directly; while ``torch.compile`` traces it stands for ``torch.ops.rrsq.linear``, which chooses when it runs.
A module that meets the same device and sizes again and again asks once (:meth:`Operation.bind`). The
environment variable ``RRSQ_KERNELS`` (``eager`` or ``triton``) or :func:`use_kernels` restrict the choice to
one backend, in compiled code too.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from rrsq.errors import KernelUnavailableError, UsageError

__all__ = [
    "BACKENDS",
    "FEW_TOKENS",
    "Candidate",
    "Constraints",
    "Facts",
    "Kernel",
    "Operation",
    "Target",
    "forced_backend",
    "operation",
    "operations",
    "use_kernels",
]

BACKENDS = ("eager", "triton")
FEW_TOKENS = 64
"""Size classes of tokens: each number up to this one is a class of its own, all larger ones are one class.

What modules keep (:meth:`Operation.prepare`) holds for a class, so constraints may tell classes apart, but
not numbers of one class.
"""
_ENVIRONMENT_VARIABLE = "RRSQ_KERNELS"
_REMEMBERED = 4096
_asked_for: ContextVar[str | None] = ContextVar("rrsq kernel backend", default=None)
P = ParamSpec("P")
R = TypeVar("R")
_library = torch.library.Library("rrsq", "DEF")
_operations: dict[str, Operation[..., Any]] = {}

Facts = Mapping[str, "int | torch.dtype"]
"""Named sizes and dtypes of a call: what a choice may depend on, never the values in a tensor."""


def _checked(backend: str, source: str) -> str:
    if backend not in BACKENDS:
        raise UsageError(f"{source} must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


@functools.cache
def _from_environment() -> str | None:
    """``RRSQ_KERNELS``, read once: looking it up costs as much as the rest of a choice."""
    value = os.environ.get(_ENVIRONMENT_VARIABLE, "")
    return _checked(value, _ENVIRONMENT_VARIABLE) if value else None


def forced_backend() -> str | None:
    """The backend that :func:`use_kernels` or ``RRSQ_KERNELS`` restricts the choice to, or None."""
    return _asked_for.get() or _from_environment()


@contextmanager
def use_kernels(backend: str) -> Iterator[None]:
    """Restrict the choice to one backend inside a ``with`` block; wins over ``RRSQ_KERNELS``.

    It holds for the thread (or asynchronous task) that asks for it.

    Raises:
        UsageError: ``backend`` is neither ``eager`` nor ``triton``.
    """
    token = _asked_for.set(_checked(backend, "the kernel backend"))
    try:
        yield
    finally:
        _asked_for.reset(token)


@functools.cache
def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False


@dataclass(frozen=True)
class Target:
    """Where a kernel would run."""

    type: str
    """``cpu``, ``cuda`` or another device type of torch."""
    capability: tuple[int, int] | None = None
    """CUDA compute capability."""
    assumed: bool = False
    """Not this machine: packages are taken to be installed there."""

    @classmethod
    def of(cls, device: torch.device) -> Target:
        """A device of this machine."""
        return cls(device.type, torch.cuda.get_device_capability(device) if device.type == "cuda" else None)

    def has(self, package: str) -> bool:
        """Whether a package is installed."""
        return self.assumed or _installed(package)


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

    @classmethod
    def on_gpu(cls, **constraints: Any) -> Constraints:
        """Those of a Triton kernel, with ``constraints`` of its own."""
        return cls(
            device_types=frozenset({"cuda"}),
            minimum_capability=(8, 0),
            modules=("triton",),
            **constraints,
        )

    def violations(self, target: Target, facts: Facts) -> list[str]:
        """Return why a call with these facts cannot be served, one phrase a reason; empty when it can."""
        return [*self._target_violations(target), *self._facts_violations(facts)]

    def check_token_classes(self) -> None:
        """Raise ValueError where ``tokens`` of one size class would be served and not served."""
        bounds = self.at_most.get("tokens", 0), self.at_least.get("tokens", 1) - 1
        if max(bounds) > FEW_TOKENS or "tokens" in self.divisible or "tokens" in self.power_of_two:
            raise ValueError(
                f"tokens may be bounded by numbers up to {FEW_TOKENS}: all larger ones are one size class"
            )

    def _target_violations(self, target: Target) -> Iterator[str]:
        for package in self.modules:
            if not target.has(package):
                yield f"the package {package} is not installed"
        if self.device_types is not None and target.type not in self.device_types:
            if not (target.type == "cpu" and "triton" in self.modules and _interpreted()):
                yield f"runs on {' or '.join(sorted(self.device_types))}, not on {target.type}"
        elif (target.capability or (99, 0)) < (self.minimum_capability or (0, 0)):
            need, have = (".".join(map(str, c or ())) for c in (self.minimum_capability, target.capability))
            yield f"needs compute capability {need}, this device has {have}"

    def _facts_violations(self, facts: Facts) -> Iterator[str]:
        for name, fact in facts.items():
            if isinstance(fact, torch.dtype):
                if name in self.dtypes and fact not in self.dtypes[name]:
                    yield f"{name} of {fact} is not supported"
                continue
            if fact % self.divisible.get(name, 1):
                yield f"{name} = {fact} is not a multiple of {self.divisible[name]}"
            if fact < self.at_least.get(name, fact):
                yield f"{name} = {fact} is less than {self.at_least[name]}"
            if fact > self.at_most.get(name, fact):
                yield f"{name} = {fact} is more than {self.at_most[name]}"
            if name in self.power_of_two and fact & (fact - 1):
                yield f"{name} = {fact} is not a power of two"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Kernel:
    """One implementation of an operation: a function with its signature."""

    name: str
    """``triton.linear_int8``, for reports."""
    backend: str
    function: Callable[..., Any]
    constraints: Constraints
    priority: int
    """The capable kernel of the highest priority is chosen."""


@dataclass(frozen=True)
class Candidate:
    """A kernel and why it cannot serve a call; no reasons: it can."""

    kernel: Kernel
    reasons: tuple[str, ...]


class Operation(Generic[P, R]):
    """A function with several implementations; see the module's documentation.

    Attributes:
        name: that of the function and of the op in ``torch.ops.rrsq``.
        reference: the eager implementation.
        kernels: all implementations, best first.
        typical: facts of an ordinary call, for reports.
    """

    def __init__(
        self,
        reference: Callable[P, R],
        fake: Callable[..., Any],
        sizes: Callable[..., tuple[tuple[str, int], ...]] | None,
        dtypes: tuple[str, ...],
        mutates: Collection[str],
        typical: Facts,
        activations: int,
        rows: bool,
    ) -> None:
        functools.update_wrapper(self, reference)
        self.name = reference.__name__
        self.reference = reference
        self.typical = typical
        self._activations = activations
        self._rows = rows
        parameters = inspect.signature(reference).parameters
        self._parameters = tuple(parameters)
        self._defaults = tuple(parameter.default for parameter in parameters.values())
        self._dtypes = tuple((name, self._parameters.index(name)) for name in dtypes)
        self._sizes = sizes
        self._chosen: dict[Any, Callable[..., Any]] = {}
        self.kernels = [Kernel(f"eager.{self.name}", "eager", reference, Constraints(), 0)]
        _library.define(self.name + _schema(reference, mutates))
        _library.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(
            f"rrsq::{self.name}", lambda *args: fake(*self._complete(args, {})), lib=_library
        )
        self._op = getattr(torch.ops.rrsq, self.name)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the best kernel for the arguments.

        Raises:
            KernelUnavailableError: nothing fits; the message lists every candidate with its reasons.
        """
        if torch.compiler.is_compiling():
            return self._op(*args, **kwargs)
        if kwargs or len(args) != len(self._parameters):
            args = self._complete(args, kwargs)  # type: ignore[assignment]
        if type(args[0]) is not Tensor:  # A tensor that is traced, or that is none.
            return self._op(*args)
        return self._choose(args)(*args)

    def kernel(
        self, backend: str, constraints: Constraints, priority: int = 10
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Add the decorated function as an implementation.

        It is called with all arguments, positionally; where modules keep it (:meth:`prepare`), with the
        activations positionally and the others by the reference's names. What its own ``prepare`` makes of
        an operation of rows takes them with any leading dimensions.

        Raises:
            ValueError: a constraint on ``tokens`` tells numbers of one size class apart.
        """
        constraints.check_token_classes()

        def add(function: Callable[..., Any]) -> Callable[..., Any]:
            name = f"{_checked(backend, 'the kernel backend')}.{self.name}"
            self.kernels.append(Kernel(name, backend, function, constraints, priority))
            self.kernels.sort(key=lambda kernel: -kernel.priority)
            self._chosen.clear()
            return function

        return add

    def prepare(self, *args: Any) -> Callable[..., Any]:
        """What runs calls like this one, with all that will be the same looked up once.

        For modules, which multiply by the same weight thousands of times. It serves activations of the same
        device, dtypes and channels, and not of no tokens: of the same shape where there are up to
        :data:`FEW_TOKENS` tokens, else of any larger number. At least the choice of the kernel is made; a
        kernel with more to prepare has an attribute ``prepare`` of its function, which takes all arguments
        and returns a function of those that are activations, or None.

        Of an operation of rows, activations ``[tokens, channels]`` may be ``[..., channels]`` here, and the
        first result has the leading dimensions of the first of them: a view costs the host as much as a
        launch.

        Args:
            args: all arguments of a call; those that are activations come first.

        Raises:
            KernelUnavailableError: nothing fits.
        """
        device, count = args[0].device, self._activations
        function: Any = self._op  # Shapes only.
        if device.type != "meta":
            rows = args
            if self._rows:
                rows = args[0].reshape(-1, args[0].shape[-1]), *map(_as_rows, args[1:count]), *args[count:]
            facts = self._facts(self._dtypes_of(rows), self._sizes_of(rows))
            function = self.select(Target.of(device), facts, str(device)).function
        prepare = getattr(function, "prepare", None)
        run = None if prepare is None else prepare(*args)
        if run is None:
            constant = zip(self._parameters[count:], args[count:], strict=True)
            run = functools.partial(function, **dict(constant))  # Adds no frame to the call.
            run = _of_rows(run) if self._rows else run
        return _on_its_device(device, run)

    def bind(self, device: torch.device, **facts: int | torch.dtype) -> Callable[..., R]:
        """The implementation for calls on a device with these sizes and dtypes, as a plain function.

        For modules, which choose when they meet a device (and a number of tokens of another size class), and
        again when :func:`forced_backend` has another answer. The function takes all arguments, positionally.
        While ``torch.compile`` traces, call the operation itself.

        Args:
            device: where the arguments will be.
            facts: as the operation's ``sizes`` and ``dtypes`` name them; an absent one constrains nothing.

        Raises:
            KernelUnavailableError: nothing fits.
        """
        if device.type == "meta":  # No data: only shapes.
            return self._op
        return _on_its_device(device, self.select(Target.of(device), facts, str(device)).function)

    def select(self, target: Target, facts: Facts, where: str | None = None) -> Kernel:
        """The kernel for a call.

        Raises:
            KernelUnavailableError: nothing fits; the message lists every candidate with its reasons.
        """
        candidates = self.explain(target, facts)
        for candidate in candidates:
            if not candidate.reasons:
                return candidate.kernel
        listing = "\n".join(f"  {c.kernel.name}: {'; '.join(c.reasons)}" for c in candidates)
        named = ", ".join(f"{name} {value}" for name, value in facts.items())
        raise KernelUnavailableError(
            f"no kernel for {self.name} on {where or target.type} ({named}):\n{listing}\n"
            f"Unset {_ENVIRONMENT_VARIABLE} or use another device, dtype or group size."
        )

    def explain(self, target: Target, facts: Facts) -> list[Candidate]:
        """All implementations, best first, each with the reasons why it cannot serve a call."""
        backend = forced_backend()
        return [
            Candidate(
                kernel,
                (*_backend_reasons(kernel, target, backend), *kernel.constraints.violations(target, facts)),
            )
            for kernel in self.kernels
        ]

    def _complete(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """All arguments in order, as Python would bind them."""
        count = len(args)
        if not kwargs and inspect.Parameter.empty not in self._defaults[count:]:
            return args + self._defaults[count:]
        bound = inspect.signature(self.reference).bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.args

    def _run(self, *args: Any) -> Any:
        """What the op in ``torch.ops.rrsq`` runs."""
        args = self._complete(args, {})
        return self._choose(args)(*args)

    def _choose(self, args: tuple[Any, ...]) -> Callable[..., Any]:
        dtypes, sizes = self._dtypes_of(args), self._sizes_of(args)
        key = (args[0].device, forced_backend(), dtypes, sizes)
        chosen = self._chosen.get(key)
        if chosen is None:
            if len(self._chosen) >= _REMEMBERED:
                self._chosen.clear()
            chosen = self._chosen[key] = self.bind(args[0].device, **self._facts(dtypes, sizes))
        return chosen

    def _dtypes_of(self, args: tuple[Any, ...]) -> tuple[torch.dtype, ...]:
        return tuple([getattr(args[i], "dtype", args[i]) for _, i in self._dtypes])

    def _sizes_of(self, args: tuple[Any, ...]) -> tuple[tuple[str, int], ...]:
        return () if self._sizes is None else self._sizes(*args)

    def _facts(self, dtypes: tuple[torch.dtype, ...], sizes: tuple[tuple[str, int], ...]) -> dict[str, Any]:
        return dict(zip((name for name, _ in self._dtypes), dtypes, strict=True)) | dict(sizes)


def _schema(function: Callable[..., Any], mutates: Collection[str]) -> str:
    """The signature as ``torch.library`` reads it."""

    def prototype() -> None:
        """Only its signature counts: that of the function, with annotations that are no strings."""

    prototype.__signature__ = inspect.signature(function, eval_str=True)  # type: ignore[attr-defined]
    return torch.library.infer_schema(prototype, mutates_args=tuple(mutates))


def _backend_reasons(kernel: Kernel, target: Target, backend: str | None) -> list[str]:
    if backend is not None and kernel.backend != backend:
        return [f"the backend {backend} was asked for"]
    if backend is None and kernel.backend == "triton" and target.type == "cpu":
        return ["on a CPU the interpreter only runs when asked for"]
    return []


def _as_rows(x: Any) -> Any:
    """``[..., channels]`` as ``[tokens, channels]``; what has one dimension, or is no tensor, as it is."""
    return x.flatten(0, -2) if isinstance(x, Tensor) and x.ndim > 2 else x


def _of_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of rows, for activations with any leading dimensions, which its first result has too."""

    def run(x: Tensor, *others: Any) -> Any:
        if x.ndim == 2:
            return function(x, *others)
        results = function(x.reshape(-1, x.shape[-1]), *map(_as_rows, others))
        first, *more = (results,) if isinstance(results, Tensor) else results
        first = first.view(*x.shape[:-1], first.shape[-1])
        return (first, *more) if more else first

    return run


def _on_its_device(device: torch.device, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as it is run on a device: Triton launches on the current one."""
    if device.type != "cuda" or torch.cuda.device_count() == 1:
        return function

    def run(*args: Any) -> Any:
        if torch.cuda.current_device() == device.index:
            return function(*args)
        with torch.cuda.device(device):
            return function(*args)

    return run


def operation(
    *,
    fake: Callable[..., Any],
    sizes: Callable[..., tuple[tuple[str, int], ...]] | None = None,
    dtypes: tuple[str, ...] = (),
    mutates: Collection[str] = (),
    typical: Facts | None = None,
    activations: int = 1,
    rows: bool = False,
) -> Callable[[Callable[P, R]], Operation[P, R]]:
    """Make an :class:`Operation` of the decorated function, its eager reference.

    The schema is that of its signature: tensors, None, numbers, strings and dtypes, the first argument a
    tensor on the device where the operation runs; one tensor, a tuple of them, or nothing comes back, which
    aliases no argument.

    Args:
        fake: given the same arguments, results of the right shapes and dtypes, for tracing.
        sizes: given the same arguments, (name, size) pairs that kernels may constrain. Both functions get all
            arguments, positionally: what they do not look at may be ``*_``.
        dtypes: arguments whose dtype kernels may constrain.
        mutates: arguments that are written to.
        typical: facts of an ordinary call, for reports.
        activations: how many arguments, the first ones, differ from call to call (:meth:`Operation.prepare`).
        rows: activations are ``[tokens, channels]`` or ``[channels]``, or ``[tokens]`` beside the former, and
            so is the first result.
    """

    def define(function: Callable[P, R]) -> Operation[P, R]:
        made = Operation(function, fake, sizes, dtypes, mutates, typical or {}, activations, rows)
        _operations[made.name] = made
        return made

    return define


def operations() -> Mapping[str, Operation[..., Any]]:
    """All operations that are defined so far, by name."""
    return _operations
