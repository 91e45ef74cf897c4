"""One declarative specification a model family, and their registry."""

from .family import LinearInput, ModelFamily, ModelSizes
from .registry import families, family_for, register_family

__all__ = ["LinearInput", "ModelFamily", "ModelSizes", "families", "family_for", "register_family"]
