"""``rrsq doctor``: is everything here that rrsq needs, and which kernels will it use?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from rrsq.cli.console import examples, printable, stdout
from rrsq.cli.options import RECIPE, DataRoot
from rrsq.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from rrsq.doctor import Finding
    from rrsq.model_kernels import ModelKernels, Step
    from rrsq.recipe import Recipe

__all__ = ["EXAMPLES", "doctor", "report_kernels"]

EXAMPLES = examples(
    "rrsq doctor",
    "rrsq doctor --data-root ~/data",
    "RRSQ_KERNELS=eager rrsq doctor",
    "rrsq doctor meta-llama/Meta-Llama-3-8B",
    "rrsq doctor out/",
    "rrsq doctor MODEL --recipe rrs-paper-w4a4kv4",
)
MARKS = {"ok": Text("✓", "green"), "note": Text("!", "yellow"), "problem": Text("✗", "bold red")}


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A Hub id, a local Hugging Face folder, a .gguf file, or a checkpoint of rrsq's: say which"
            " kernels would serve its inputs. Only its configuration is read.",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="With MODEL: name of a recipe or path of a YAML file. Default: rrs-w4a4kv4, or that of the"
            " checkpoint.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    data_root: DataRoot = None,
) -> None:
    """Report libraries, GPUs, the kernels that will be used and why others will not, data and caches.

    Says what to do about each problem, and exits with 1 if there is one that makes something fail.

    With MODEL: for each input of its linears, which kernel would rotate and quantize it and which would
    multiply, on the GPU here, or on one of compute capability 9.0 where there is none. Inputs that the slow
    eager reference would serve are named with the reason.
    """
    if model is not None:
        report_kernels(model, recipe, data_root)
        return
    if recipe is not None:
        raise UsageError("--recipe goes with a MODEL: rrsq doctor MODEL --recipe NAME.")
    from rrsq.doctor import examine

    findings = examine(data_root)
    for title, section in (
        ("libraries", findings.libraries),
        ("hardware", findings.hardware),
        ("kernels for a bfloat16 model here", findings.kernels),
        ("data and caches", findings.storage),
    ):
        stdout.print(_table(title, section))
    for finding in findings.all():
        if finding.hint:
            line = Text.assemble(MARKS[finding.state], f" {finding.subject}: {finding.hint}")
            stdout.print(line, soft_wrap=True)
    if any(finding.state == "problem" for finding in findings.all()):
        raise typer.Exit(1)


def _table(title: str, section: tuple[Finding, ...]) -> Table:
    table = Table(
        title=title, box=SIMPLE_HEAD, show_header=False, show_edge=False, title_justify="left", pad_edge=False
    )
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in section:
        table.add_row(MARKS[finding.state], Text(finding.subject), Text(finding.found))
    return table


def report_kernels(name: str, recipe: str | Recipe | None, data_root: Path | None) -> None:
    """Print which kernels would serve a model.

    Raises:
        typer.Exit: with 1, if no kernel can serve an input.
        RRSQError: as :func:`rrsq.model_kernels.examine_model`.
    """
    import torch

    from rrsq.kernels.operation import Target
    from rrsq.model_kernels import examine_model

    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        target, where = Target.of(device), torch.cuda.get_device_name(device)
    else:
        target = Target("cuda", (9, 0), assumed=True)
        where = "a GPU of compute capability 9.0 (there is none here: a CPU runs the eager reference)"
    found = examine_model(name, recipe, target, data_root)
    stdout.print(printable(name))
    stdout.print(f"{'its own recipe' if found.quantized else 'recipe'} {found.recipe}, on {where}")
    stdout.print()
    stdout.print(_inputs(found))
    _print_slow(found)
    if any(step.missing for one in found.inputs for step in one.steps):
        raise typer.Exit(1)


def _inputs(found: ModelKernels) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column()
    table.add_column("input", overflow="fold")
    table.add_column("layers", overflow="fold")
    table.add_column("channels", justify="right", no_wrap=True)
    table.add_column("quantized by", overflow="fold")
    table.add_column("multiplied by", overflow="fold")
    for one in found.inputs:
        slow = any(step.backend == "eager" for step in one.steps)
        mark = MARKS["problem" if any(step.missing for step in one.steps) else "note" if slow else "ok"]
        table.add_row(
            mark, one.path, _ranges(one.layers), str(one.channels), _cell(one.preparation), _cell(one.product)
        )
    return table


def _cell(step: Step | None) -> Text:
    """The operation, with what serves it where that is not a Triton kernel."""
    if step is None:
        return Text("-", "dim")
    if step.operation == "library":
        return Text("library", "dim")
    if step.backend == "triton":
        return Text(step.operation)
    return Text(f"{step.operation}, {step.backend or 'no kernel'}", "yellow" if step.backend else "bold red")


def _print_slow(found: ModelKernels) -> None:
    """Why inputs are not served by the fast kernels, a line for each kind."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for one in found.inputs:
        for step in one.steps:
            if step.reasons:
                key = (f"{step.operation}, {step.backend or 'no kernel'}", "; ".join(step.reasons))
                reasons.setdefault(key, []).append(one.path)
    stdout.print()
    if not reasons:
        stdout.print(Text.assemble(MARKS["ok"], " Triton kernels serve every quantized input."))
    for (kernel, why), paths in reasons.items():
        line = f" {', '.join(dict.fromkeys(paths))}: {kernel}, since {why}."
        stdout.print(Text.assemble(MARKS["note"], line))


def _ranges(layers: tuple[int, ...]) -> str:
    """Such as ``0-3, 5``."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][1] + 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
