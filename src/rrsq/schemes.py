"""Short names of recipes by their bits. Importing this imports next to nothing."""

from __future__ import annotations

from .errors import RecipeError, did_you_mean

__all__ = ["SCHEMES", "scheme_recipe"]

SCHEMES = {"W4A4KV4": "rrs-w4a4kv4", "W4A8KV4": "rrs-w4a8kv4", "W4A16": "gptq-w4a16"}
"""Bits of weights, activations and KV cache, and the named recipe that is meant by them."""


def scheme_recipe(scheme: str) -> str:
    """The name of the recipe of a scheme such as ``W4A8KV4``, in capitals or not.

    Raises:
        RecipeError: there is no such scheme.
    """
    name = scheme.upper()
    if name not in SCHEMES:
        raise RecipeError(
            f"There is no scheme '{scheme}'.{did_you_mean(name, SCHEMES)} Known schemes:"
            f" {', '.join(SCHEMES)}; 'rrsq recipes' lists all recipes."
        )
    return SCHEMES[name]
