"""Where vLLM's modules are in the model that a checkpoint describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..models import LinearInput, ModelFamily
from ..recipe import Recipe
from ..runtime.scheme import Treatment, changes_linears, treatment

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

__all__ = ["LinearPlace", "Places"]

# Modules of a decoder layer that vLLM calls otherwise than transformers, by model type.
_OTHER_NAMES = {"mixtral": ("mlp", "block_sparse_moe")}
# Prefixes of what is no part of the language model, as vLLM looks for them in a checkpoint.
_OTHER_PREFIXES = {"model.vision_tower.": "model.vision_tower.vision_model."}


@dataclass(frozen=True)
class LinearPlace:
    """A linear of vLLM: one of the checkpoint, or several that are one there.

    Attributes:
        layer: module path of the decoder layer in the checkpoint.
        entry: the input that it reads.
        how: what the recipe does to the input.
        quantized: of each of the checkpoint's linears, in vLLM's order, whether it is in 4 bits.
    """

    layer: str
    entry: LinearInput
    how: Treatment
    quantized: tuple[bool, ...]

    @property
    def path(self) -> str:
        """The input's name in the model."""
        return f"{self.layer}.{self.entry.path}"


class Places:
    """Translates between the paths of a checkpoint and those of vLLM's model.

    Attributes:
        layers: path of the decoder layers in vLLM.
    """

    def __init__(self, family: ModelFamily, recipe: Recipe) -> None:
        self.family = family
        self.recipe = recipe
        self.layers = family.layers
        self._mappers: list[WeightsMapper] = []
        self._theirs: dict[str, str] = {}
        self._ours: dict[str, str] = {}
        if family.model_type in _OTHER_NAMES:
            ours, theirs = _OTHER_NAMES[family.model_type]
            self._theirs, self._ours = {ours: theirs}, {theirs: ours}

    def rename(self, mapper: WeightsMapper) -> None:
        """Take over how vLLM's model names what a checkpoint has."""
        self.layers = mapper.apply_list([self.layers])[0]
        self._mappers.append(mapper)

    def outside(self, name: str) -> str:
        """The name that a tensor outside of the decoder layers has in vLLM."""
        for mapper in self._mappers:
            name = mapper.apply_list([name])[0]
        return name

    def linear(self, prefix: str, fused: Mapping[str, Sequence[str]]) -> LinearPlace | None:
        """The place of a linear of vLLM, or None for one that no recipe treats.

        Args:
            prefix: its path in vLLM.
            fused: the linears of the checkpoint that vLLM's are made of, by name.
        """
        layer, path = self._inside(prefix)
        parent, _, leaf = path.rpartition(".")
        names = fused.get(leaf, [leaf])
        for entry in self._entries(layer):
            if not entry.experts and entry.parent == parent and set(names) <= set(entry.linears):
                how = treatment(self.recipe, layer, entry)
                return LinearPlace(layer, entry, how, tuple(name in how.linears for name in names))
        return None

    def experts(self, prefix: str) -> dict[str, LinearPlace]:
        """The places of both linears of a mixture's experts by the name of their input; may be empty."""
        layer, path = self._inside(prefix)
        found: dict[str, LinearPlace] = {}
        for entry in self._entries(layer):
            if entry.experts and entry.parent == path:
                how = treatment(self.recipe, layer, entry)
                found[entry.name] = LinearPlace(layer, entry, how, (bool(how.linears),))
        return found

    def beside(self, name: str) -> str:
        """The name under which vLLM looks for a tensor that is no part of the language model."""
        for ours, theirs in _OTHER_PREFIXES.items():
            if name.startswith(ours) and not name.startswith(theirs):
                return theirs + name.removeprefix(ours)
        return name

    def in_vllm(self, path: str) -> str:
        """The path that a module of a decoder layer has in vLLM's."""
        first, dot, rest = path.partition(".")
        return self._theirs.get(first, first) + dot + rest

    def _entries(self, layer: str) -> tuple[LinearInput, ...]:
        return self.family.inputs if layer and changes_linears(self.recipe) else ()

    def _inside(self, prefix: str) -> tuple[str, str]:
        """The decoder layer that a path of vLLM is in, as the checkpoint calls it, and the path in it."""
        index, _, path = prefix.removeprefix(f"{self.layers}.").partition(".")
        if not prefix.startswith(f"{self.layers}.") or not index.isdigit():
            return "", ""
        first, dot, rest = path.partition(".")
        return self.family.layer_name(int(index)), self._ours.get(first, first) + dot + rest
