"""Telling transformers of the quantization method, without importing it.

``import rrsq`` must make ``AutoModelForCausalLM.from_pretrained`` understand a checkpoint, and must not
import torch. So the registration waits, as an import hook, until transformers' registry of quantizers is
imported.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

__all__ = ["register_with_transformers"]

_REGISTRY = "transformers.quantizers.auto"


class _LoaderWithRegistration(Loader):
    """Executes the registry module, then registers rrsq with it."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        importlib.import_module("rrsq.runtime.format.integration")


class _RegistryFinder(MetaPathFinder):
    """Finds the registry module once, as everybody else would, and wraps its loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoaderWithRegistration(spec.loader)
        return spec


def register_with_transformers() -> None:
    """Register now if transformers' registry is imported already, else as soon as it is."""
    if _REGISTRY in sys.modules:
        importlib.import_module("rrsq.runtime.format.integration")
    elif not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())
