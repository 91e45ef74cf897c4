"""Telling transformers and PEFT of the quantization method, without importing them.

``import rrsq`` must make ``AutoModelForCausalLM.from_pretrained`` understand a checkpoint, and PEFT put LoRA
beside its linears, and must not import torch. So each registration waits, as an import hook, until what it
registers with is imported. The hooks do not derive from importlib.abc, whose import takes as long as all of
rrsq's.
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

__all__ = ["register"]

_REGISTRATIONS = {
    "transformers.quantizers.auto": "rrsq.runtime.format.integration",
    "peft.tuners.lora": "rrsq.runtime.lora",
}
"""By the module that is registered with: the one of rrsq that does so when it is imported."""


class _LoaderWithRegistration:
    """Executes the module, then registers rrsq with it."""

    def __init__(self, loader: Loader, registration: str) -> None:
        self.loader = loader
        self.registration = registration

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        importlib.import_module(self.registration)


class _RegistryFinder:
    """Finds such a module once, as everybody else would, and wraps its loader."""

    def __init__(self, name: str, registration: str) -> None:
        self.name = name
        self.registration = registration

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoaderWithRegistration(spec.loader, self.registration)  # type: ignore[assignment]
        return spec


def register() -> None:
    """Register now with what is imported already, and with the rest as soon as it is."""
    waiting = {finder.name for finder in sys.meta_path if isinstance(finder, _RegistryFinder)}
    for name, registration in _REGISTRATIONS.items():
        if name in sys.modules:
            importlib.import_module(registration)
        elif name not in waiting:
            sys.meta_path.insert(0, _RegistryFinder(name, registration))
