"""One declarative specification a model family, and their registry."""

from .family import LAYER_NORM, RMS_NORM, RMS_NORM_ONE_PLUS, LinearInput, ModelFamily, NormKind
from .registry import families, family_for, family_named, register_family
from .sizes import ModelSizes

__all__ = [
    "LAYER_NORM",
    "RMS_NORM",
    "RMS_NORM_ONE_PLUS",
    "LinearInput",
    "ModelFamily",
    "ModelSizes",
    "NormKind",
    "families",
    "family_for",
    "family_named",
    "register_family",
]
