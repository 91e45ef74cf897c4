"""Options that several commands share, so that they are named and explained alike."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from rrsq.arguments import MOST
from rrsq.cli.completion import complete_model
from rrsq.errors import UsageError

__all__ = [
    "DATA",
    "ENGINE",
    "HARDWARE",
    "MOST_PROCESSES",
    "OUTPUT",
    "RECIPE",
    "Assignments",
    "BatchSize",
    "Bos",
    "BosName",
    "CalibrationData",
    "DataRoot",
    "Device",
    "DeviceName",
    "DtypeName",
    "Engine",
    "EngineName",
    "EngineOptions",
    "Model",
    "NumSamples",
    "Restart",
    "Seed",
    "SequenceLength",
    "TensorParallelSize",
    "check_output_file",
    "given",
    "parse_batch_size",
    "parse_integers",
    "refuse",
    "refuse_for_engine",
    "resolve_device",
]

MOST_PROCESSES = 1024  # Of tensor parallelism: no machine has more.

# Panels of the help text.
DATA = "Data"
ENGINE = "Engine"
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


class EngineName(str, Enum):
    """What runs a model."""

    TRANSFORMERS = "transformers"
    VLLM = "vllm"


Engine = Annotated[
    EngineName,
    typer.Option(
        help="What runs the model. vllm needs pip install 'rrsq\\[vllm]' and an NVIDIA GPU.",
        rich_help_panel=ENGINE,
    ),
]

TensorParallelSize = Annotated[
    int,
    typer.Option(
        "--tensor-parallel-size",
        "-t",
        min=1,
        max=MOST_PROCESSES,
        help="With vllm: GPUs that share each layer.",
        rich_help_panel=ENGINE,
    ),
]

EngineOptions = Annotated[
    str,
    typer.Option(
        metavar="JSON",
        help="With vllm: further options of its LLM, such as '{\"gpu_memory_utilization\": 0.5}'.",
        rich_help_panel=ENGINE,
    ),
]


class BosName(str, Enum):
    """Whether each window of text begins with the BOS token."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


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

NumSamples = Annotated[
    int, typer.Option(min=1, max=MOST, help="Windows of calibration text.", rich_help_panel=DATA)
]

SequenceLength = Annotated[
    int, typer.Option(min=8, max=MOST, help="Tokens in a window.", rich_help_panel=DATA)
]

Bos = Annotated[
    BosName,
    typer.Option(
        help="Whether each window of text begins with the tokenizer's BOS token. auto: with the models that"
        " need it (Gemma); with others, and with never, only the text's start, if the tokenizer adds one.",
        rich_help_panel=DATA,
    ),
]

Seed = Annotated[
    int,
    typer.Option(min=0, max=MOST, help="Of the random signs and the windows' places.", rich_help_panel=DATA),
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


def parse_integers(
    option: str, text: str, *, least: int = 1, most: int = 2**31 - 1, example: str = "1,16,2048"
) -> tuple[int, ...]:
    """Return the numbers between commas. Raises :class:`UsageError` for anything else or one out of range."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(least <= number <= most for number in numbers):
        kind = "positive numbers" if least == 1 else f"numbers from {least} to {most}"
        raise UsageError(f"{option} {text:.200}: expected {kind}, for example {example}.")
    return numbers


def resolve_device(device: DeviceName) -> str:
    """Return ``cpu`` or ``cuda``. Raises :class:`UsageError` if CUDA is asked for and missing."""
    from rrsq.devices import find_device

    return find_device(device.value)


def given(context: typer.Context, name: str) -> bool:
    """Whether the command line names an option, by its parameter's name."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def refuse(context: typer.Context, names: Iterable[str], reason: str) -> None:
    """Refuse options of the command line, by their parameters' names, that would have no effect.

    Raises:
        UsageError: ``OPTION reason. Leave it out.``
    """
    for name in names:
        if given(context, name):
            option = next(each.opts[0] for each in context.command.params if each.name == name)
            raise UsageError(f"{option} {reason}. Leave it out.")


def refuse_for_engine(context: typer.Context, engine: EngineName, *others: str) -> None:
    """Refuse options that an engine has no use for; ``others`` are such with vllm, as ``--device`` is."""
    if engine is EngineName.VLLM:
        refuse(context, ("device", *others), "has no effect with --engine vllm, which takes the GPU")
    else:
        refuse(context, ("tensor_parallel_size", "engine_options"), "needs --engine vllm")


def check_output_file(option: str, path: Path | None) -> None:
    """Refuse a file that cannot be written, before it is computed. Raises :class:`UsageError`."""
    if path is None:
        return
    try:
        if not path.absolute().parent.is_dir():
            raise UsageError(f"{option} {path}: there is no folder '{path.parent}'.")
        if path.is_dir():
            raise UsageError(f"{option} {path}: that is a folder. Name a file.")
    except (OSError, ValueError) as error:
        raise UsageError(f"{option} {str(path)[:100]}: no path of a file ({str(error)[:100]}).") from error
