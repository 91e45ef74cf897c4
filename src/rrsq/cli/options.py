"""Options that several commands share, so that they are named and explained alike."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from rrsq.cli.completion import complete_model
from rrsq.errors import UsageError

__all__ = [
    "DATA",
    "HARDWARE",
    "OUTPUT",
    "RECIPE",
    "Assignments",
    "BatchSize",
    "CalibrationData",
    "DataRoot",
    "Device",
    "DeviceName",
    "DtypeName",
    "Model",
    "NumSamples",
    "Restart",
    "Seed",
    "SequenceLength",
    "parse_batch_size",
    "resolve_device",
]

# Panels of the help text.
DATA = "Data"
HARDWARE = "Hardware"
OUTPUT = "Output"
RECIPE = "Recipe"


class DeviceName(str, Enum):
    """Where to compute."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class DtypeName(str, Enum):
    """What to hold an unquantized model's numbers in."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hub id, a local Hugging Face folder, or a .gguf file.",
        autocompletion=complete_model,
    ),
]
DataRoot = Annotated[
    Path | None,
    typer.Option(
        envvar="RRSQ_DATA_ROOT",
        help="Folder laid out like the Hub (ROOT/Salesforce/wikitext/...) where data sets are looked for "
        "first. Without it, or for a data set it lacks, the Hub is asked.",
        rich_help_panel=DATA,
    ),
]

Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override one field of the recipe, such as weights.group_size=64. May be repeated.",
        rich_help_panel=RECIPE,
    ),
]

CalibrationData = Annotated[
    str,
    typer.Option(
        metavar="DATA",
        help="Text to calibrate on: wikitext2, a Hub data set (org/name or org/name:config), or a .txt,"
        " .jsonl or .parquet file.",
        rich_help_panel=DATA,
    ),
]

NumSamples = Annotated[int, typer.Option(min=1, help="Windows of calibration text.", rich_help_panel=DATA)]

SequenceLength = Annotated[int, typer.Option(min=8, help="Tokens in a window.", rich_help_panel=DATA)]

Seed = Annotated[
    int, typer.Option(min=0, help="Of the random signs and the windows' places.", rich_help_panel=DATA)
]

Restart = Annotated[
    bool,
    typer.Option(
        "--restart",
        help="Throw away what an unfinished run of the same output left, and begin again.",
        rich_help_panel=OUTPUT,
    ),
]

Device = Annotated[
    DeviceName,
    typer.Option(help="Where to compute. auto takes the GPU if there is one.", rich_help_panel=HARDWARE),
]

BatchSize = Annotated[
    str,
    typer.Option(
        metavar="auto|N",
        help="Windows or questions to run at a time. auto: one window, and as many questions as surely fit "
        "into the memory that is free.",
        rich_help_panel=HARDWARE,
    ),
]


def parse_batch_size(text: str) -> int | None:
    """Return the number, or None for ``auto``. Raises :class:`UsageError` for anything else."""
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise UsageError(f"--batch-size {text}: expected a positive number or auto.")
    return int(text)


def resolve_device(device: DeviceName) -> str:
    """Return ``cpu`` or ``cuda``. Raises :class:`UsageError` if CUDA is asked for and missing."""
    from rrsq.devices import find_device

    return find_device(device.value)
