"""``rrsq eval``: what a model's quantization cost."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rrsq.cli.console import examples, print_note, print_warning, progress_bar, quiet_libraries, stdout
from rrsq.cli.options import DATA, HARDWARE, OUTPUT, DataRoot, Device, DeviceName, DtypeName, resolve_device
from rrsq.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.progress import Progress, TaskID

    from rrsq.evaluation.report import EvaluationReport, ModelReport
    from rrsq.evaluation.tasks import Task, TaskOptions

__all__ = ["EXAMPLES", "evaluate"]

EXAMPLES = examples(
    "rrsq eval out/ --tasks wikitext2 --baseline HuggingFaceTB/SmolLM2-135M --limit 24",
    "rrsq eval out/ --tasks wikitext2,text:notes.txt --data-root ~/data --json result.json",
)


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A quantized checkpoint, a local Hugging Face folder, or a Hub id."
        ),
    ],
    tasks: Annotated[
        str,
        typer.Option(
            metavar="TASK[,TASK...]",
            help="What to measure. wikitext2: perplexity on the test split of WikiText-2. text:FILE: "
            "perplexity on a .txt, .jsonl or .parquet file, or on a Hub data set (text:org/name:config).",
            rich_help_panel=DATA,
        ),
    ] = "wikitext2",
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="A second model to measure on the same data and to set the first in ratio to, usually the "
            "one that was quantized.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Only the first so many windows: quicker, and to be compared only with runs of the same "
            "limit. Without it, all.",
            rich_help_panel=DATA,
        ),
    ] = None,
    sequence_length: Annotated[
        int,
        typer.Option(
            min=2,
            help="Tokens in a window. Published perplexities use 2048; shorter windows give higher ones.",
            rich_help_panel=DATA,
        ),
    ] = 2048,
    data_root: DataRoot = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Windows to run at a time.", rich_help_panel=HARDWARE)
    ] = 1,
    device: Device = DeviceName.AUTO,
    dtype: Annotated[
        DtypeName,
        typer.Option(
            help="Precision of the computation around the quantized layers, and of an unquantized model. "
            "auto keeps what the model's config says.",
            rich_help_panel=HARDWARE,
        ),
    ] = DtypeName.AUTO,
    json_path: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Also write the result to this file, with its convention, device and library versions.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
) -> None:
    """Measure a model, quantized or not: perplexity the standard way.

    The text is cut into consecutive windows of 2048 tokens, each is run on its own, and the perplexity is exp
    of the mean negative log-likelihood of all tokens but each window's first. Lower is better. A baseline
    beside it says what the quantization cost.
    """
    if json_path is not None and not json_path.absolute().parent.is_dir():
        raise UsageError(f"--json {json_path}: there is no folder '{json_path.parent}'.")

    from rrsq.evaluation.report import EvaluationReport, write_json
    from rrsq.evaluation.tasks import TaskOptions, parse_tasks

    options = TaskOptions(
        sequence_length=sequence_length, limit=limit, batch_size=batch_size, data_root=data_root
    )
    parsed = parse_tasks(tasks)
    for task in parsed:
        task.prepare(options)
    device_name = resolve_device(device)
    quiet_libraries()
    with progress_bar() as progress:
        reports = [
            _measure(path, parsed, options, device_name, dtype.value, progress)
            for path in (model, baseline)
            if path is not None
        ]
    report = EvaluationReport(reports[0], reports[1] if baseline is not None else None)
    _print_report(report)
    if json_path is not None:
        write_json(json_path, report.to_dict())
        print_note(f"Wrote {json_path}")


def _measure(
    path: str, tasks: list[Task], options: TaskOptions, device: str, dtype: str, progress: Progress
) -> ModelReport:
    """Load a model, run the tasks on it, and let it go."""
    from rrsq.checkpoint.loading import load_model, load_tokenizer
    from rrsq.evaluation.report import ModelReport

    name = _short_name(path)
    bar = progress.add_task(f"{name}: loading", total=None)
    tokenizer = load_tokenizer(path, data_root=options.data_root)
    model = load_model(path, device=device, dtype=dtype, data_root=options.data_root)
    results = []
    for number, task in enumerate(tasks):
        if number:
            bar = progress.add_task("", total=None)
        progress.reset(bar, total=None, description=f"{name}: {task.name}")

        show = _progress_callback(progress, bar, f"{name}: {task.name}")
        results.append(task.run(model, tokenizer, replace(options, on_progress=show)))
    return ModelReport.of(path, model, tuple(results))


def _progress_callback(progress: Progress, bar: TaskID, label: str) -> Callable[[int, int, str], None]:
    def show(done: int, total: int, so_far: str) -> None:
        progress.update(bar, completed=done, total=total, description=f"{label}, {so_far}")

    return show


def _short_name(path: str) -> str:
    return Path(path).name or path


def _print_report(report: EvaluationReport) -> None:
    from rrsq.cli.evaluation_table import evaluation_table

    stdout.print(evaluation_table(report))
    for result in report.model.results:
        print_note(f"{result.task}: {result.convention}")
        if not report.compares_same_data(result.task):
            print_warning(
                f"{result.task}: the two models tokenize the text differently, so their perplexities per "
                "token do not compare."
            )
    for measured in (report.model, *([report.baseline] if report.baseline else [])):
        for result in measured.results:
            if not math.isfinite(result.value):
                print_warning(f"{measured.model}: {result.task} gave {result.value}; its logits are broken.")
