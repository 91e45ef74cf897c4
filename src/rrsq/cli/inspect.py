"""``rrsq inspect``: what is in a checkpoint, or what would be in one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from rrsq.cli.completion import complete_model
from rrsq.cli.console import examples, human_bytes, printable, stdout
from rrsq.cli.forecast import print_forecast
from rrsq.cli.options import DataRoot, DeviceName, resolve_device
from rrsq.errors import UsageError

if TYPE_CHECKING:
    from rrsq.runtime.format.format import CheckpointInfo

__all__ = ["EXAMPLES", "inspect"]

EXAMPLES = examples(
    "rrsq inspect out/", "rrsq inspect out/ --layers", "rrsq inspect HuggingFaceTB/SmolLM2-135M"
)


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="OUT|MODEL",
            help="Folder of an rrsq checkpoint; or a model: Hub id, Hugging Face folder or .gguf file.",
            autocompletion=complete_model,
        ),
    ],
    layers: Annotated[
        bool,
        typer.Option("--layers", help="Also list each layer's signal-to-noise ratios and cache error."),
    ] = False,
    data_root: DataRoot = None,
) -> None:
    """Print what is in a checkpoint: recipe, rotations, sizes, how it was calibrated.

    Only headers are read, so it answers at once whatever the model's size. Of a model that is not quantized:
    its architecture and size, and what 'rrsq quantize' would make of it by its defaults.
    """
    from rrsq.runtime.format.describe import checkpoint_contents
    from rrsq.runtime.format.json_files import read_config
    from rrsq.runtime.format.loading import is_checkpoint, locate_model, read_info

    located, _ = locate_model(model, data_root)
    if not is_checkpoint(located):
        if layers:
            raise UsageError(f"--layers is of a checkpoint, and '{model}' is none that rrsq quantized.")
        _forecast(model, data_root)
        return
    checkpoint = Path(located)
    info = read_info(checkpoint)
    contents = checkpoint_contents(checkpoint)
    stdout.print(_overview(checkpoint, read_config(checkpoint), info, contents))
    stdout.print(_tensors(contents))
    if layers:
        stdout.print(_layers(info))


def _forecast(model: str, data_root: Path | None) -> None:
    """What the defaults of ``rrsq quantize`` would give."""
    from rrsq.model_kernels import DEFAULT_RECIPE
    from rrsq.quantizer.production.produce import CalibrationText
    from rrsq.recipe import load_recipe

    text = CalibrationText()
    print_forecast(
        model,
        load_recipe(DEFAULT_RECIPE),
        num_samples=text.num_samples,
        sequence_length=text.sequence_length,
        device=resolve_device(DeviceName.AUTO),
        data_root=data_root,
    )


def _overview(
    checkpoint: Path, config: dict[str, Any], info: CheckpointInfo, contents: dict[str, tuple[int, int, int]]
) -> Table:
    from rrsq.runtime.format.describe import (
        checkpoint_linear_bits,
        describe_activations,
        describe_cache,
        describe_calibration,
        describe_embedding,
        describe_exceptions,
        describe_head,
        describe_rotation,
        describe_weights,
        shares_head,
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
        ("embedding", describe_embedding(info)),
        ("output head", describe_head(info, shared=shares_head(info, contents))),
        *([("except", exceptions)] if exceptions else []),
        ("bits of linears", checkpoint_linear_bits(checkpoint, info.recipe)),
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
