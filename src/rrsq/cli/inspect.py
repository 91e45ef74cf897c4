"""``rrsq inspect``: what is in a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from rrsq.cli.console import examples, human_bytes, printable, stdout
from rrsq.errors import CheckpointError, ModelLoadError

if TYPE_CHECKING:
    from rrsq.runtime.format.format import CheckpointInfo

__all__ = ["EXAMPLES", "inspect"]

EXAMPLES = examples("rrsq inspect out/", "rrsq inspect out/ --layers")


def inspect(
    checkpoint: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of an rrsq checkpoint.")],
    layers: Annotated[
        bool,
        typer.Option("--layers", help="Also list each layer's signal-to-noise ratios and cache error."),
    ] = False,
) -> None:
    """Print what is in a checkpoint: recipe, rotations, sizes, how it was calibrated.

    Only headers are read, so it answers at once whatever the model's size.
    """
    from rrsq.runtime.format.describe import checkpoint_contents
    from rrsq.runtime.format.format import parse_info
    from rrsq.runtime.format.json_files import read_config
    from rrsq.runtime.format.loading import is_checkpoint

    if not (checkpoint / "config.json").is_file():
        raise ModelLoadError(f"'{checkpoint}' is no checkpoint: there is no config.json in it.")
    config = read_config(checkpoint)
    if not is_checkpoint(str(checkpoint)):
        raise CheckpointError(f"'{checkpoint}' is a model, but none that rrsq quantized.")
    info = parse_info(config["quantization_config"])
    stdout.print(_overview(checkpoint, config, info))
    stdout.print(_tensors(checkpoint_contents(checkpoint)))
    if layers:
        stdout.print(_layers(info))


def _overview(checkpoint: Path, config: dict[str, Any], info: CheckpointInfo) -> Table:
    from rrsq.runtime.format.describe import (
        describe_activations,
        describe_cache,
        describe_calibration,
        describe_exceptions,
        describe_head,
        describe_rotation,
        describe_weights,
    )

    exceptions = describe_exceptions(info)
    text = config.get("text_config")
    layers = (text if isinstance(text, dict) else config).get("num_hidden_layers")
    rows = (
        ("source", info.source_model),
        ("architecture", f"{config.get('model_type')}, {layers} layers"),
        ("recipe", info.recipe.name),
        ("weights", describe_weights(info)),
        ("activations", describe_activations(info)),
        ("KV cache", describe_cache(info)),
        ("output head", describe_head(info)),
        *([("except", exceptions)] if exceptions else []),
        ("rotation", describe_rotation(info)),
        ("calibration", describe_calibration(info)),
        ("seed", str(info.seed)),
        ("made with", ", ".join(f"{name} {number}" for name, number in info.versions.items())),
        ("format version", str(info.format_version)),
    )
    table = Table(title=printable(str(checkpoint)), show_header=False, title_justify="left")
    for label, text in rows:
        table.add_row(label, printable(text))
    return table


def _tensors(contents: dict[str, tuple[int, int, int]]) -> Table:
    table = Table("tensors", "count", "size", "bits per weight", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for kind, (count, size, weights) in contents.items():
        bits = f"{8 * size / weights:.2f}" if weights else ""
        table.add_row(kind, str(count), human_bytes(size), bits)
    total = sum(size for _, size, _ in contents.values())
    table.add_row(
        "all", str(sum(count for count, _, _ in contents.values())), human_bytes(total), "", style="bold"
    )
    return table


def _layers(info: CheckpointInfo) -> Table:
    from rrsq.runtime.format.describe import LAYER_COLUMNS, describe_layers

    headings, rows = describe_layers(info)
    table = Table(*headings, caption=LAYER_COLUMNS, caption_justify="left")
    for column in table.columns:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    return table
