"""``rrsq quantize``: a model in, a 4-bit checkpoint out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from rrsq.cli.completion import complete_recipe, complete_scheme, complete_tasks
from rrsq.cli.console import (
    examples,
    human_bytes,
    human_seconds,
    print_note,
    progress_bar,
    quiet_libraries,
    stdout,
)
from rrsq.cli.eval import evaluate_and_print
from rrsq.cli.forecast import print_forecast
from rrsq.cli.options import (
    DATA,
    HARDWARE,
    OUTPUT,
    RECIPE,
    Assignments,
    Bos,
    BosName,
    CalibrationData,
    DataRoot,
    Device,
    DeviceName,
    Model,
    NumSamples,
    Restart,
    Seed,
    SequenceLength,
    given,
    resolve_device,
)
from rrsq.cli.quantization_bars import QuantizationBars
from rrsq.errors import RRSQError, UsageError
from rrsq.schemes import SCHEMES, scheme_recipe

if TYPE_CHECKING:
    from rrsq.quantizer.budget.plan import Budget
    from rrsq.quantizer.outcome import QuantizationReport
    from rrsq.recipe import Recipe
    from rrsq.runtime.format.format import CheckpointInfo

__all__ = ["EXAMPLES", "quantize"]

BUDGET = "Budget"
EVALUATION = "Evaluation"
EXAMPLES = examples(
    "rrsq quantize meta-llama/Meta-Llama-3-8B -o out/",
    "rrsq quantize ./model -o out/ --dry-run",
    "rrsq quantize ./model -o out/ --recipe rrs-w4a8kv4 --calibration-data notes.jsonl",
    "rrsq quantize ./model -o out/ --scheme W4A16 --ignore '*.layers.0.*' --tasks wikitext2,kl --limit 24",
    "rrsq quantize ./model -o out/ --target-bits 4.6 --target-activation-bits 4.5 --sensitivities model.json",
    "rrsq quantize ./model -o out/ --calibration calib/",
    "rrsq quantize model.gguf -o out/ --set activations.smoothing.group_size=32 --num-samples 32",
)


def quantize(
    context: typer.Context,
    model: Model,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="OUT", help="Folder to write the checkpoint to.", rich_help_panel=OUTPUT
        ),
    ],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it exists.", rich_help_panel=OUTPUT)
    ] = False,
    max_shard_size: Annotated[
        str, typer.Option(help="Largest size of one safetensors file.", rich_help_panel=OUTPUT)
    ] = "5GB",
    restart: Restart = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="ORG/NAME",
            help="Send the finished checkpoint to this new repository of the Hub.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    private: Annotated[
        bool,
        typer.Option(
            "--private", help="With --push-to-hub: nobody else sees the repository.", rich_help_panel=OUTPUT
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only say what would come out: sizes, bits, rotations, memory, kernels. Nothing is written,"
            " and of MODEL only the configuration is read.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    recipe: Annotated[
        str,
        typer.Option(
            help="Name of a recipe ('rrsq recipes' lists them) or path of a YAML file.",
            rich_help_panel=RECIPE,
            autocompletion=complete_recipe,
        ),
    ] = "rrs-w4a4kv4",
    scheme: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(SCHEMES),
            help="Bits of weights, activations and cache, in place of --recipe: the recipe for them.",
            rich_help_panel=RECIPE,
            autocompletion=complete_scheme,
        ),
    ] = None,
    assignments: Assignments = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Keep the linears of this pattern in 16 bits, such as '*.o_proj'. May be repeated.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    target_bits: Annotated[
        float | None,
        typer.Option(
            metavar="BITS",
            help="Stored bits a weight, on the mean of the layers' linears and the output head, such as 4.6,"
            " scales included. What each bit is worth is measured, and the recipe gets the overrides of least"
            " expected loss.",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    target_activation_bits: Annotated[
        float | None,
        typer.Option(
            metavar="BITS",
            help="The same of the linears' activations, such as 4.5, weighted by the weights they meet.",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    sensitivities: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With these: file (JSON) to keep what was measured in, or to take it from if it is there, so"
            " that another target of the same recipe costs no measurement.",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    calibration_data: CalibrationData = "wikitext2",
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="CALIB",
            help="Folder of 'rrsq calibrate' to use in place of text: quicker, and a bit less accurate,"
            " since its Hessians are the full-precision model's.",
            rich_help_panel=DATA,
        ),
    ] = None,
    num_samples: NumSamples = 128,
    sequence_length: SequenceLength = 2048,
    seed: Seed = 0,
    bos: Bos = BosName.AUTO,
    data_root: DataRoot = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="TASK[,TASK...]",
            help="Measure MODEL and OUT at the end, as 'rrsq eval' does.",
            rich_help_panel=EVALUATION,
            autocompletion=complete_tasks,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --tasks: only the first so many windows of a text and questions of a task.",
            rich_help_panel=EVALUATION,
        ),
    ] = None,
    device: Device = DeviceName.AUTO,
    offload_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder on a fast disk for the activations of calibration, which else are in memory.",
            rich_help_panel=HARDWARE,
        ),
    ] = None,
) -> None:
    """Quantize a model to INT4 weights, activations and KV cache, without training.

    Rotations are folded into the weights; layer after layer is calibrated on text, rounded with GPTQ and
    packed. OUT is an ordinary Hugging Face folder that loads with AutoModelForCausalLM once rrsq is imported;
    it appears whole or not at all. A run that was stopped, however it was, goes on with the same command.
    """
    import rrsq
    from rrsq.api import check_sensitivities, choose_recipe
    from rrsq.arguments import check_target
    from rrsq.hub import check_push
    from rrsq.quantizer.budget.measure import kept_losses
    from rrsq.quantizer.budget.plan import Budget
    from rrsq.quantizer.calibration.workers import is_first_process
    from rrsq.runtime.format.loading import read_info
    from rrsq.storage import check_output

    if calibration is not None:
        _refuse_text_options(context)
    if scheme is not None:
        if given(context, "recipe"):
            raise UsageError("--scheme stands for a recipe. Leave out --recipe or --scheme.")
        recipe = scheme_recipe(scheme)
    if limit is not None and tasks is None:
        raise UsageError("--limit is of --tasks, which is not given.")
    if private and push_to_hub is None:
        raise UsageError("--private is of --push-to-hub, which is not given.")
    budget = Budget(
        check_target("target_bits", target_bits),
        check_target("target_activation_bits", target_activation_bits),
    )
    if dry_run:
        check_output(output, overwrite=overwrite)
        chosen = choose_recipe(recipe, assignments or (), ignore or ())
        kept = check_sensitivities(budget, sensitivities, calibrated=calibration is not None)
        if budget:
            chosen = _foreseen(model, chosen, budget, kept or kept_losses(output), data_root)
        print_forecast(
            model,
            chosen,
            num_samples=0 if calibration is not None else num_samples,
            sequence_length=sequence_length,
            device=resolve_device(device),
            data_root=data_root,
            offloaded=offload_dir is not None,
        )
        return
    quiet_libraries()
    if push_to_hub is not None and is_first_process():
        check_push(push_to_hub)
    if tasks is not None:
        _check_tasks(tasks, data_root)
    with progress_bar(shown=is_first_process()) as progress:
        bars = QuantizationBars(progress, "tokenizer and calibration text")
        report = rrsq.quantize(
            model,
            output,
            recipe=recipe,
            overrides=assignments or (),
            ignore=ignore or (),
            target_bits=target_bits,
            target_activation_bits=target_activation_bits,
            sensitivities=sensitivities,
            calibration_data=calibration_data,
            num_samples=num_samples,
            sequence_length=sequence_length,
            bos=bos.value,
            seed=seed,
            calibration=calibration,
            device=device.value,
            data_root=data_root,
            overwrite=overwrite,
            restart=restart,
            max_shard_size=max_shard_size,
            offload_dir=offload_dir,
            on_step=bars.show,
            on_note=print_note,
        )
        bars.finish()
    if is_first_process():
        stdout.print(_summary(report, read_info(output), output))
        if tasks is None:
            print_note(f"Next: rrsq eval {model} {output}")
        else:
            evaluate_and_print(
                [model, str(output)],
                tasks,
                limit=limit,
                bos=bos.value,
                device=device.value,
                data_root=data_root,
            )
        if push_to_hub is not None:
            _push(output, push_to_hub, private=private)


def _foreseen(model: str, recipe: Recipe, budget: Budget, file: Path, data_root: Path | None) -> Recipe:
    """The recipe within a budget, or, as long as nothing is measured, the recipe as it is."""
    from rrsq.quantizer.budget.measure import foreseen_allocation

    found = foreseen_allocation(model, recipe, budget, file, data_root)
    if found is None:
        print_note(
            "The budget is possible. What it is spent on is known when the sensitivities are measured; what"
            f" follows is '{recipe.name}' as it is."
        )
        return recipe
    return found.recipe


def _push(output: Path, repository: str, *, private: bool) -> None:
    """Push, and say that the checkpoint is there whatever comes of it."""
    from rrsq.hub import push

    try:
        stdout.print(push(output, repository, private=private))
    except RRSQError as error:
        option = " --private" if private else ""
        message = f"{error} The checkpoint is finished: 'rrsq push {output} {repository}{option}' sends it."
        raise type(error)(message) from error


def _refuse_text_options(context: typer.Context) -> None:
    """With a calibration folder no text is run, so options about text would be ignored: say so instead."""
    for name in ("calibration_data", "num_samples", "sequence_length", "bos"):
        if given(context, name):
            raise UsageError(
                f"--{name.replace('_', '-')} has no effect with --calibration, which takes the place of the"
                " text. Leave out one of them."
            )


def _check_tasks(tasks: str, data_root: Path | None) -> None:
    """Refuse a task that there is not, or without data, before hours are spent."""
    from rrsq.evaluation.run import prepare_tasks
    from rrsq.evaluation.tasks import TaskOptions, parse_tasks

    prepare_tasks(parse_tasks(tasks), TaskOptions(data_root=data_root))


def _summary(report: QuantizationReport, info: CheckpointInfo, output: Path) -> Table:
    """The table at the end of a run."""
    from rrsq.runtime.format.describe import (
        checkpoint_contents,
        checkpoint_linear_bits,
        describe_exceptions,
        describe_head,
        describe_rotation,
        stored_bits,
    )

    table = Table(title=f"{output} ({info.recipe.name})", show_header=False, title_justify="left")
    before, after = report.bytes_before, report.bytes_after
    table.add_row("size of weights", f"{human_bytes(before)} → {human_bytes(after)} ({after / before:.0%})")
    table.add_row("bits per weight", stored_bits(checkpoint_contents(output)))
    table.add_row("bits of linears", checkpoint_linear_bits(output, info.recipe))
    table.add_row("output head", describe_head(info))
    table.add_row("time", human_seconds(report.seconds))
    table.add_row("peak memory", human_bytes(report.peak_memory))
    if report.peak_gpu_memory is not None:
        table.add_row("peak GPU memory", human_bytes(report.peak_gpu_memory))
    ranked = sorted(
        (layer for layer in report.layers if layer.output_snr_db is not None),
        key=lambda layer: layer.output_snr_db or 0,
    )
    if ranked:
        worst = ", ".join(f"layer {layer.index} ({layer.output_snr_db:.1f} dB)" for layer in ranked[:3])
        table.add_row("lowest output SNR", worst)
    if report.sensitive_layers:
        table.add_row("8-bit keys", f"layers {', '.join(map(str, report.sensitive_layers))}")
    table.add_row("rotation", describe_rotation(info))
    if exceptions := describe_exceptions(info):
        table.add_row("except", exceptions)
    table.add_row("fell back to RTN", ", ".join(report.fallbacks) or "none")
    if report.undersampled_experts:
        table.add_row("experts with few tokens", "; ".join(report.undersampled_experts))
    return table
