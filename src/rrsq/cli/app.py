"""The ``rrsq`` application: global options and the list of commands.

A command module imports only typer, rich and rrsq's light modules at its top, so that ``rrsq --help`` answers
at once.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Annotated

import typer

from rrsq import __version__
from rrsq.cli.bench import EXAMPLES as BENCH_EXAMPLES
from rrsq.cli.bench import bench
from rrsq.cli.calibrate import EXAMPLES as CALIBRATE_EXAMPLES
from rrsq.cli.calibrate import calibrate
from rrsq.cli.compare import EXAMPLES as COMPARE_EXAMPLES
from rrsq.cli.compare import compare
from rrsq.cli.console import examples, show_warnings
from rrsq.cli.doctor import EXAMPLES as DOCTOR_EXAMPLES
from rrsq.cli.doctor import doctor
from rrsq.cli.errors import ErrorReportingGroup
from rrsq.cli.eval import EXAMPLES as EVAL_EXAMPLES
from rrsq.cli.eval import evaluate
from rrsq.cli.export import EXAMPLES as EXPORT_EXAMPLES
from rrsq.cli.export import export
from rrsq.cli.generate import EXAMPLES as GENERATE_EXAMPLES
from rrsq.cli.generate import generate
from rrsq.cli.inspect import EXAMPLES as INSPECT_EXAMPLES
from rrsq.cli.inspect import inspect as inspect_checkpoint
from rrsq.cli.models import EXAMPLES as MODELS_EXAMPLES
from rrsq.cli.models import models
from rrsq.cli.push import EXAMPLES as PUSH_EXAMPLES
from rrsq.cli.push import push
from rrsq.cli.quantize import EXAMPLES as QUANTIZE_EXAMPLES
from rrsq.cli.quantize import quantize
from rrsq.cli.recipes import EXAMPLES as RECIPES_EXAMPLES
from rrsq.cli.recipes import recipes
from rrsq.cli.serve import EXAMPLES as SERVE_EXAMPLES
from rrsq.cli.serve import serve

__all__ = ["app"]

app = typer.Typer(
    cls=ErrorReportingGroup,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples(
        "rrsq quantize HuggingFaceTB/SmolLM2-135M -o out/",
        "rrsq eval HuggingFaceTB/SmolLM2-135M out/ --tasks wikitext2,kl,arc_e --limit 24",
        'rrsq generate out/ "The capital of France is"',
    ),
)


# Panels of the list of commands.
MAKE = "Make a 4-bit checkpoint"
MEASURE = "Measure"
LOOK = "Look and use"


def _add(name: str, command: Callable[..., None], examples_of_it: str, panel: str = MAKE) -> None:
    """Register a command; its docstring is its help, with the line breaks inside paragraphs taken out."""
    text = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.getdoc(command) or "")
    app.command(name, help=text, epilog=examples_of_it, rich_help_panel=panel)(command)


# The commands, in the order of the help. To add one, import its function and its examples above, and give it
# one line here.
_add("quantize", quantize, QUANTIZE_EXAMPLES)
_add("calibrate", calibrate, CALIBRATE_EXAMPLES)
_add("recipes", recipes, RECIPES_EXAMPLES)
_add("models", models, MODELS_EXAMPLES)
_add("eval", evaluate, EVAL_EXAMPLES, MEASURE)
_add("compare", compare, COMPARE_EXAMPLES, MEASURE)
_add("bench", bench, BENCH_EXAMPLES, MEASURE)
_add("generate", generate, GENERATE_EXAMPLES, LOOK)
_add("export", export, EXPORT_EXAMPLES, LOOK)
_add("push", push, PUSH_EXAMPLES, LOOK)
_add("serve", serve, SERVE_EXAMPLES, LOOK)
_add("inspect", inspect_checkpoint, INSPECT_EXAMPLES, LOOK)
_add("doctor", doctor, DOCTOR_EXAMPLES, LOOK)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"rrsq {__version__}")
        raise typer.Exit()


@app.callback()
def rrsq(
    debug: Annotated[
        bool,
        typer.Option("--debug", envvar="RRSQ_DEBUG", help="Show tracebacks and the libraries' warnings."),
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """4-bit weights, activations and KV cache for Hugging Face LLMs, with Rotated Runtime Smooth."""
    show_warnings(debug=debug)
