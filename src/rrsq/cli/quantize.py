"""``rrsq quantize``: a model in, a 4-bit checkpoint out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from rrsq.cli.console import (
    examples,
    human_bytes,
    human_seconds,
    print_note,
    progress_bar,
    quiet_libraries,
    stdout,
)
from rrsq.cli.options import (
    DATA,
    HARDWARE,
    OUTPUT,
    RECIPE,
    Assignments,
    CalibrationData,
    DataRoot,
    Device,
    DeviceName,
    Model,
    NumSamples,
    Restart,
    Seed,
    SequenceLength,
)
from rrsq.cli.quantization_bars import QuantizationBars
from rrsq.errors import UsageError

if TYPE_CHECKING:
    from rrsq.quantizer.outcome import QuantizationReport
    from rrsq.runtime.format.format import CheckpointInfo

__all__ = ["EXAMPLES", "quantize"]

EXAMPLES = examples(
    "rrsq quantize meta-llama/Meta-Llama-3-8B -o out/",
    "rrsq quantize ./model -o out/ --recipe rrs-w4a8kv4 --calibration-data notes.jsonl",
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
    recipe: Annotated[
        str,
        typer.Option(
            help="Name of a recipe ('rrsq recipes' lists them) or path of a YAML file.",
            rich_help_panel=RECIPE,
        ),
    ] = "rrs-w4a4kv4",
    assignments: Assignments = None,
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
    data_root: DataRoot = None,
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
    from rrsq.quantizer.calibration.workers import is_first_process
    from rrsq.runtime.format.loading import read_info

    if calibration is not None:
        _refuse_text_options(context)
    quiet_libraries()
    with progress_bar(shown=is_first_process()) as progress:
        bars = QuantizationBars(progress, "tokenizer and calibration text")
        report = rrsq.quantize(
            model,
            output,
            recipe=recipe,
            overrides=assignments or (),
            calibration_data=calibration_data,
            num_samples=num_samples,
            sequence_length=sequence_length,
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
        print_note(f"Next: rrsq eval {model} {output}")


def _refuse_text_options(context: typer.Context) -> None:
    """With a calibration folder no text is run, so options about text would be ignored: say so instead."""
    for name in ("calibration_data", "num_samples", "sequence_length"):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise UsageError(
                f"--{name.replace('_', '-')} has no effect with --calibration, which takes the place of the"
                " text. Leave out one of them."
            )


def _summary(report: QuantizationReport, info: CheckpointInfo, output: Path) -> Table:
    """The table at the end of a run."""
    from rrsq.runtime.format.describe import describe_exceptions, describe_rotation

    table = Table(title=f"{output} ({info.recipe.name})", show_header=False, title_justify="left")
    before, after = report.bytes_before, report.bytes_after
    table.add_row("size of weights", f"{human_bytes(before)} → {human_bytes(after)} ({after / before:.0%})")
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
