"""The model families rrsq knows."""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedArchitectureError
from .arcee import ARCEE
from .exaone4 import EXAONE4
from .family import ModelFamily
from .gemma import GEMMA
from .gemma2 import GEMMA2
from .gemma3 import GEMMA3, GEMMA3_TEXT
from .granite import GRANITE
from .llama import LLAMA
from .mistral import MISTRAL
from .mixtral import MIXTRAL
from .olmo2 import OLMO2
from .olmo3 import OLMO3
from .opt import OPT
from .phi3 import PHI3
from .qwen2 import QWEN2
from .qwen2_moe import QWEN2_MOE
from .qwen3 import QWEN3
from .qwen3_moe import QWEN3_MOE
from .seed_oss import SEED_OSS
from .smollm3 import SMOLLM3
from .starcoder2 import STARCODER2

__all__ = ["families", "family_for", "family_named", "needs_bos", "register_family"]

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
    model_type = str(getattr(config, "model_type", None))
    family = family_named(model_type)
    reason = family.not_covered(config)
    if reason is not None:
        raise UnsupportedArchitectureError(f"This {model_type} model is not supported: {reason}.")
    return family


def family_named(model_type: str) -> ModelFamily:
    """The family of a ``model_type``.

    Raises:
        UnsupportedArchitectureError: none is registered.
    """
    family = _FAMILIES.get(model_type)
    if family is None:
        raise UnsupportedArchitectureError(
            f"The architecture '{model_type}' is not supported. Supported: {', '.join(sorted(_FAMILIES))}."
            " A family is one short file: docs/adding-a-model.md shows how to add one."
        )
    return family


def needs_bos(config: Any) -> bool:
    """Whether a configuration's family has :attr:`ModelFamily.needs_bos`; of an unknown family, no."""
    family = _FAMILIES.get(str(getattr(config, "model_type", None)))
    return family is not None and family.needs_bos


_ALL = (
    ARCEE,
    EXAONE4,
    GEMMA,
    GEMMA2,
    GEMMA3,
    GEMMA3_TEXT,
    GRANITE,
    LLAMA,
    MISTRAL,
    MIXTRAL,
    OLMO2,
    OLMO3,
    OPT,
    PHI3,
    QWEN2,
    QWEN2_MOE,
    QWEN3,
    QWEN3_MOE,
    SEED_OSS,
    SMOLLM3,
    STARCODER2,
)
for _family in _ALL:
    register_family(_family)
