"""``rrsq recipes``: the named recipes."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from rrsq.cli.console import examples, print_note, stdout
from rrsq.cli.tables import Rows, show_rows
from rrsq.errors import UsageError

__all__ = ["EXAMPLES", "fields_table", "recipes"]

EXAMPLES = examples("rrsq recipes", "rrsq recipes rrs-w4a4kv4 > mine.yaml", "rrsq recipes --fields")


def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Print this recipe in full, as YAML to start from.")
    ] = None,
    fields: Annotated[
        bool, typer.Option("--fields", help="List all fields of a recipe: values, default and meaning.")
    ] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="With --fields: as Markdown, as docs/recipes.md has them.")
    ] = False,
) -> None:
    """List the named recipes with what they cost in bits; print one as YAML; list what a recipe may say.

    Bits of weights, activations and the KV cache. Those of weights and cache count scales, multipliers and
    minima: of a linear with 4096 inputs, and the mean of keys and values.
    """
    from rrsq.bits import activation_bits, cache_bits, weight_bits
    from rrsq.recipe import load_recipe, recipe_names

    if fields or markdown:
        if name is not None or not fields:
            raise UsageError("--fields goes without NAME, and --markdown with --fields.")
        show_rows(fields_table(), markdown=markdown)
        return
    if name is not None:
        import yaml

        typer.echo(yaml.safe_dump(load_recipe(name).model_dump(mode="json"), sort_keys=False), nl=False)
        return
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), expand=True)
    table.add_column("recipe", no_wrap=True)
    for column in ("weights", "activations", "cache"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("what it is", ratio=1)
    for entry in recipe_names():
        recipe = load_recipe(entry)
        bits = (weight_bits(recipe), activation_bits(recipe), cache_bits(recipe))
        table.add_row(recipe.name, *(f"{number:.4g}" for number in bits), recipe.description)
    stdout.print(table)
    print_note("Numbers are bits, scales included; 'rrsq recipes NAME' prints a recipe in full.")


def fields_table() -> Rows:
    """A header and one row a field."""
    from rrsq.recipe_fields import recipe_fields

    rows = [
        (f"`{field.path}`", field.values, f"`{field.default}`" if field.default else "", field.meaning)
        for field in recipe_fields()
    ]
    return [("field", "values", "default", "meaning"), *rows]
