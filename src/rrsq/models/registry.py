"""The model families rrsq knows."""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedArchitectureError
from .family import ModelFamily
from .llama import LLAMA
from .qwen2 import QWEN2

__all__ = ["families", "family_for", "register_family"]

_FAMILIES: dict[str, ModelFamily] = {}


def register_family(family: ModelFamily) -> ModelFamily:
    """Make a family known; a later registration of the same ``model_type`` replaces the earlier one."""
    _FAMILIES[family.model_type] = family
    return family


def families() -> list[ModelFamily]:
    """All registered families, by ``model_type``."""
    return [_FAMILIES[name] for name in sorted(_FAMILIES)]


def family_for(config: Any) -> ModelFamily:
    """The family of a transformers configuration.

    Raises:
        UnsupportedArchitectureError: no family is registered, or the configuration uses a feature that the
            family does not cover.
    """
    model_type = getattr(config, "model_type", None)
    family = _FAMILIES.get(str(model_type))
    if family is None:
        raise UnsupportedArchitectureError(
            f"The architecture '{model_type}' is not supported. Supported: {', '.join(sorted(_FAMILIES))}."
            " A family is one short file: docs/adding-a-model.md shows how to add one."
        )
    reason = family.not_covered(config)
    if reason is not None:
        raise UnsupportedArchitectureError(f"This {model_type} model is not supported: {reason}.")
    return family


for _family in (LLAMA, QWEN2):
    register_family(_family)
