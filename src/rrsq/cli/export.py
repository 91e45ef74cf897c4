"""``rrsq export``: a checkpoint as other engines read it."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from rrsq.cli.console import (
    examples,
    human_bytes,
    print_note,
    printable,
    progress_bar,
    quiet_libraries,
    stdout,
)
from rrsq.cli.options import OUTPUT

if TYPE_CHECKING:
    from rrsq.exporting.produce import ExportReport

__all__ = ["EXAMPLES", "export"]

EXAMPLES = examples(
    "rrsq export rotated/ -o plain/",
    "rrsq export rotated/ -o plain/ --dtype float16 --max-shard-size 2GB",
)


class FormatName(str, Enum):
    """What to write."""

    COMPRESSED_TENSORS = "compressed-tensors"


class ExportDtype(str, Enum):
    """Of the scales and of what is not quantized."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of an rrsq checkpoint.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Folder to write the export to.", rich_help_panel=OUTPUT
        ),
    ],
    format: Annotated[
        FormatName, typer.Option(help="Format of the export.", rich_help_panel=OUTPUT)
    ] = FormatName.COMPRESSED_TENSORS,
    dtype: Annotated[
        ExportDtype,
        typer.Option(
            help="Of the scales, and of what is not quantized. auto: the checkpoint's own. Scales are"
            " rounded to it, by 0.4 % at most in bfloat16 and 0.05 % in float16.",
            rich_help_panel=OUTPUT,
        ),
    ] = ExportDtype.AUTO,
    drop_cache: Annotated[
        bool,
        typer.Option(
            "--drop-cache",
            help="Export a checkpoint with a quantized KV cache, which no other engine has, without it.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    max_shard_size: Annotated[
        str, typer.Option(help="Largest size of one safetensors file.", rich_help_panel=OUTPUT)
    ] = "5GB",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace DIR if it exists.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Write a checkpoint in a format that vLLM and others read without rrsq.

    DIR is a plain model in the format of compressed-tensors: what rrsq folded into its weights is part of
    them. Linears with 16-bit activations stay in 4 bits (Marlin in vLLM); with 8-bit ones they become int8,
    whose codes are exact. It appears whole or not at all.

    Refused is what other engines would get wrong: rotations at run time, 4-bit activations, and so on. The
    recipes w4a16-rotated and gptq-w4a16 make checkpoints that can be exported; the default does not.
    """
    import rrsq

    quiet_libraries()
    with progress_bar() as progress:
        task = progress.add_task("reading the checkpoint", total=None)

        def show(done: int, total: int, text: str) -> None:
            progress.update(task, completed=done, total=total, description=text or "done")

        report = rrsq.export(
            checkpoint,
            output,
            format=format.value,
            dtype=dtype.value,
            drop_cache=drop_cache,
            overwrite=overwrite,
            max_shard_size=max_shard_size,
            on_step=show,
        )
    stdout.print(_summary(report, output))
    print_note(f"Next: vllm serve {output}")


def _summary(report: ExportReport, output: Path) -> Table:
    table = Table(title=printable(str(output)), show_header=False, title_justify="left")
    for scheme, count in report.schemes.items():
        table.add_row(_linears(count), scheme)
    table.add_row(_linears(report.kept), f"not quantized, {report.dtype}")
    table.add_row("size", f"{human_bytes(report.bytes_before)} → {human_bytes(report.bytes_after)}")
    table.add_row("dtype of scales", report.dtype)
    table.add_row("largest error of a scale", f"{report.scale_error:.3%}")
    if report.dropped_cache:
        table.add_row("KV cache", "16 bits; the checkpoint's own is quantized")
    return table


def _linears(count: int) -> str:
    return f"{count} linear{'' if count == 1 else 's'}"
