"""``rrsq compare``: several recipes on one model, in one command that can be interrupted."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rrsq.arguments import MOST
from rrsq.cli.console import examples, print_note, progress_bar, quiet_libraries
from rrsq.cli.eval import print_report
from rrsq.cli.evaluation_bars import EvaluationBars
from rrsq.cli.options import (
    DATA,
    HARDWARE,
    OUTPUT,
    BatchSize,
    Bos,
    BosName,
    DataRoot,
    Device,
    DeviceName,
    DtypeName,
    Model,
    parse_batch_size,
    resolve_device,
)
from rrsq.cli.quantization_bars import QuantizationBars

if TYPE_CHECKING:
    from rich.progress import Progress

    from rrsq.comparison.steps import Listener

__all__ = ["EXAMPLES", "compare"]

CALIBRATION = "Calibration"
EXAMPLES = examples(
    "rrsq compare HuggingFaceTB/SmolLM2-135M --recipes rtn-w4a4,quarot-w4a4kv4,rrs-w4a4kv4 "
    "--tasks wikitext2,kl,arc_e -o compared/",
    "rrsq compare ./model --recipes quarot-w4a4kv4,rrs-w4a4kv4 --tasks wikitext2,kl --caches own,16,4 "
    "-o compared/",
    "rrsq compare ./model --recipes rrs-w4a8kv4,mine.yaml --tasks wikitext2 --limit 24 -o compared/",
)


def compare(
    model: Model,
    recipes: Annotated[
        str,
        typer.Option(
            metavar="RECIPE[,RECIPE...]", help="Names of recipes ('rrsq recipes' lists them) or YAML files."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Folder for the checkpoints, the results and the report. A second run goes on where the "
            "first one stopped.",
            rich_help_panel=OUTPUT,
        ),
    ],
    tasks: Annotated[
        str,
        typer.Option(
            metavar="TASK[,TASK...]", help="What to measure, as for 'rrsq eval'.", rich_help_panel=DATA
        ),
    ] = "wikitext2",
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST,
            help="Only the first so many windows of a text, and questions of each task.",
            rich_help_panel=DATA,
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(min=0, help="Solved examples before each question.", rich_help_panel=DATA),
    ] = None,
    sequence_length: Annotated[
        int,
        typer.Option(min=2, max=MOST, help="Tokens in a window of a measured text.", rich_help_panel=DATA),
    ] = 2048,
    bos: Bos = BosName.AUTO,
    data_root: DataRoot = None,
    calibration_data: Annotated[
        str,
        typer.Option(
            metavar="DATA",
            help="Text to calibrate all recipes on: wikitext2, a Hub data set (org/name or org/name:config), "
            "or a .txt, .jsonl or .parquet file.",
            rich_help_panel=CALIBRATION,
        ),
    ] = "wikitext2",
    num_samples: Annotated[
        int, typer.Option(min=1, max=MOST, help="Windows of calibration text.", rich_help_panel=CALIBRATION)
    ] = 128,
    calibration_length: Annotated[
        int,
        typer.Option(min=8, max=MOST, help="Tokens in a calibration window.", rich_help_panel=CALIBRATION),
    ] = 2048,
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=MOST, help="Of the random signs and the windows' places.", rich_help_panel=CALIBRATION
        ),
    ] = 0,
    caches: Annotated[
        str,
        typer.Option(
            metavar="CACHE[,CACHE...]",
            help="KV caches to measure each recipe with. [bold]own[/bold]: the recipe's. [bold]16[/bold]: "
            "not quantized, so that weights and activations are compared by themselves. [bold]4[/bold]: that "
            "of rrs-w4a4kv4, the default recipe, and with it the full-precision model too, which shows what "
            "the cache alone costs. Weights are quantized once, by the recipe as it is. Example: own,16,4.",
            rich_help_panel=DATA,
        ),
    ] = "own",
    noise_floor: Annotated[
        bool,
        typer.Option(
            help="Also measure the full-precision model in another rounding (bfloat16 if the others are "
            "measured in float32, else float32) on the tasks over windows: what differs less from full "
            "precision than it does cannot be told from rounding.",
            rich_help_panel=DATA,
        ),
    ] = True,
    bench: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="A file of 'rrsq bench --whole --model FOLDER/RECIPE/checkpoint --json FILE', whose speeds "
            "and memory the report shows too; may be given several times.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    batch_size: BatchSize = "auto",
    device: Device = DeviceName.AUTO,
    dtype: Annotated[
        DtypeName,
        typer.Option(help="Precision to measure in, as for 'rrsq eval'.", rich_help_panel=HARDWARE),
    ] = DtypeName.AUTO,
) -> None:
    """Quantize a model by several recipes and measure each beside full precision.

    The calibration text is the same for all. Each finished quantization and each finished task is kept in
    FOLDER and not done again, unless the model, the recipe, the data or an option has changed. All results
    are in FOLDER/report.html, with pictures, report.md and report.json; the checkpoints in
    FOLDER/RECIPE/checkpoint may be deleted then.
    """
    size = parse_batch_size(batch_size)

    from rrsq.comparison.benchmarks import read_benchmarks
    from rrsq.comparison.document import html, markdown
    from rrsq.comparison.plan import ComparisonPlan, read_recipes
    from rrsq.comparison.steps import compare as run_comparison
    from rrsq.comparison.subjects import read_caches
    from rrsq.comparison.write_up import comparison_document, comparison_to_dict
    from rrsq.evaluation.scores import jsonable, write_json, write_text
    from rrsq.evaluation.tasks import TaskOptions, parse_tasks
    from rrsq.quantizer.production.produce import CalibrationText

    quiet_libraries()
    plan = ComparisonPlan(
        model=model,
        folder=output,
        recipes=read_recipes([name.strip() for name in recipes.split(",") if name.strip()]),
        tasks=parse_tasks(tasks),
        options=TaskOptions(
            sequence_length=sequence_length,
            bos=bos.value,
            limit=limit,
            batch_size=size,
            num_fewshot=num_fewshot,
            data_root=data_root,
        ),
        calibration=CalibrationText(calibration_data, num_samples, calibration_length, seed, bos.value),
        caches=read_caches(caches),
        noise_floor=noise_floor,
        device=resolve_device(device),
        dtype=dtype.value,
    )
    benchmarks = read_benchmarks(bench or [], list(plan.recipes))
    with progress_bar() as progress:
        bars = _Bars(progress)
        comparison = run_comparison(plan, bars.listener())
        bars.finish()
    command = shlex.join(["rrsq", *sys.argv[1:]])
    write_json(output / "report.json", jsonable(comparison_to_dict(comparison, plan, command, benchmarks)))
    document = comparison_document(comparison, plan, command, benchmarks)
    write_text(output / "report.md", markdown(document))
    write_text(output / "report.html", html(document))
    print_report(comparison.report)
    print_note(f"Wrote report.html, report.md and report.json to {output}")


class _Bars:
    """The bars of quantizations and evaluations in one display."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._evaluation = EvaluationBars(progress)
        self._quantizations: dict[str, QuantizationBars] = {}

    def listener(self) -> Listener:
        """What the comparison tells, shown."""
        from rrsq.comparison.steps import Listener

        return Listener(
            note=self._progress.console.print,
            preparing=self._evaluation.say,
            quantizing=self._quantizing,
            evaluating=self._evaluation.show,
        )

    def finish(self) -> None:
        """Take away what never counted."""
        self._evaluation.finish()

    def _quantizing(self, name: str, done: int, total: int, per_layer: int, text: str) -> None:
        if name not in self._quantizations:
            self._quantizations[name] = QuantizationBars(self._progress, text, label=f"{name}: ")
        self._quantizations[name].show(done, total, per_layer, text)
