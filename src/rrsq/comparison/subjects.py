"""What a comparison measures: the full-precision model and each recipe's checkpoint, with some caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from rrsq.comparison.folder import FULL_PRECISION
from rrsq.errors import UsageError
from rrsq.recipe import KVCache, Recipe, load_recipe

__all__ = ["CACHES", "CacheChoice", "Subject", "cache_of", "read_caches", "subjects"]

CacheChoice = Literal["own", "16", "4"]
"""A KV cache to measure with: the recipe's, none that is quantized, or that of :data:`DEFAULT`."""
CACHES: tuple[CacheChoice, ...] = get_args(CacheChoice)
DEFAULT = "rrs-w4a4kv4"


@dataclass(frozen=True)
class Subject:
    """One model to be measured.

    Attributes:
        name: in the report, and of its records.
        recipe: the checkpoint's, by the name of its folder; None for the full-precision model.
        cache: put in the place of the checkpoint's own; None quantizes none. Nothing is, if it is ``own``.
        dtype: to measure in, if not that of the comparison.
    """

    name: str
    recipe: str | None = None
    cache: KVCache | Literal["own"] | None = "own"
    dtype: str | None = None

    @property
    def is_floor(self) -> bool:
        """Whether it is the full-precision model in another rounding."""
        return self.dtype is not None


def read_caches(specification: str) -> tuple[CacheChoice, ...]:
    """Read a comma-separated list of caches.

    Raises:
        UsageError: one is none of :data:`CACHES`, or none is named.
    """
    names = [name.strip() for name in specification.split(",") if name.strip()]
    known: dict[str, CacheChoice] = {choice: choice for choice in CACHES}
    for name in names:
        if name not in known:
            raise UsageError(f"--caches {name}: the caches are {', '.join(CACHES)}.")
    if not names:
        raise UsageError(f"--caches names none. The caches are {', '.join(CACHES)}.")
    return tuple(dict.fromkeys(known[name] for name in names))


def cache_of(choice: CacheChoice, recipe: Recipe | None) -> KVCache | None:
    """The cache that a choice means for a recipe, or for the full-precision model.

    The default's values are not rotated in the cache, because their weights are; where they are not, the
    cache does it.
    """
    if choice == "own":
        return None if recipe is None else recipe.kv_cache
    if choice == "16":
        return None
    cache = load_recipe(DEFAULT).kv_cache
    assert cache is not None
    folded = recipe is not None and recipe.rotation is not None and recipe.rotation.head
    return cache.model_copy(update={"values": cache.values.model_copy(update={"rotate": not folded})})


def subjects(
    recipes: Mapping[str, Recipe], caches: Sequence[CacheChoice], floor_dtype: str | None
) -> list[Subject]:
    """What is to be measured, in the order of the report, the full-precision model first.

    A recipe whose own cache is that of another choice is measured once.

    Args:
        recipes: by the names of their folders.
        caches: to measure each with.
        floor_dtype: of the full-precision model in another rounding; None leaves it out.
    """
    found = [Subject(FULL_PRECISION)]
    if floor_dtype is not None:
        found.append(Subject(f"{FULL_PRECISION}@{floor_dtype}", dtype=floor_dtype))
    if "4" in caches:
        found.append(Subject(f"{FULL_PRECISION}@kv4", cache=cache_of("4", None)))
    for name, recipe in recipes.items():
        for choice in caches:
            subject = subject_of(name, recipe, choice)
            if subject not in found:
                found.append(subject)
    return found


def subject_of(name: str, recipe: Recipe, choice: CacheChoice) -> Subject:
    """A recipe's checkpoint with one of the caches."""
    cache = cache_of(choice, recipe)
    if cache == recipe.kv_cache:
        return Subject(name, name)
    return Subject(f"{name}@kv{choice}", name, cache)
