"""``rrsq recipes``: the named recipes."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from rrsq.cli.console import examples, stdout

__all__ = ["EXAMPLES", "recipes"]

EXAMPLES = examples("rrsq recipes", "rrsq recipes rrs-w4a4kv4 > mine.yaml")


def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Print this recipe in full, as YAML to start from.")
    ] = None,
) -> None:
    """List the named recipes, or print one as YAML."""
    from rrsq.recipe import load_recipe, recipe_names

    if name is not None:
        import yaml

        typer.echo(yaml.safe_dump(load_recipe(name).model_dump(mode="json"), sort_keys=False), nl=False)
        return
    table = Table("recipe", "weights", "activations", "KV cache", "what it is")
    for entry in recipe_names():
        recipe = load_recipe(entry)
        cache = "16 bits" if recipe.kv_cache is None else f"{recipe.kv_cache.keys.bits} bits"
        table.add_row(
            recipe.name,
            f"{recipe.weights.bits} bits",
            f"{recipe.activations.bits} bits",
            cache,
            recipe.description,
        )
    stdout.print(table)
