"""``rrsq quantize``: a model in, a 4-bit checkpoint out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from rrsq.cli.options import DATA, OUTPUT, DataRoot, Device, DeviceName, resolve_device
from rrsq.errors import UsageError

if TYPE_CHECKING:
    from rrsq.checkpoint.format import CheckpointInfo
    from rrsq.quantization.report import QuantizationReport
    from rrsq.recipe import Recipe

__all__ = ["EXAMPLES", "quantize"]

EXAMPLES = examples(
    "rrsq quantize meta-llama/Meta-Llama-3-8B -o out/",
    "rrsq quantize ./model -o out/ --recipe rrs-w4a8kv4 --calibration-data notes.jsonl",
    "rrsq quantize model.gguf -o out/ --set activations.smoothing.group_size=32 --num-samples 32",
)

RECIPE = "Recipe"


def quantize(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A Hub id, a local Hugging Face folder, or a .gguf file."),
    ],
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
    recipe: Annotated[
        str,
        typer.Option(
            help="Name of a recipe ('rrsq recipes' lists them) or path of a YAML file.",
            rich_help_panel=RECIPE,
        ),
    ] = "rrs-w4a4kv4",
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Override one field of the recipe, such as weights.group_size=64. May be repeated.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    calibration_data: Annotated[
        str,
        typer.Option(
            metavar="DATA",
            help="Text to calibrate on: wikitext2, a Hub data set (org/name or org/name:config), or a .txt,"
            " .jsonl or .parquet file.",
            rich_help_panel=DATA,
        ),
    ] = "wikitext2",
    num_samples: Annotated[
        int, typer.Option(min=1, help="Windows of calibration text.", rich_help_panel=DATA)
    ] = 128,
    sequence_length: Annotated[
        int, typer.Option(min=8, help="Tokens in a window.", rich_help_panel=DATA)
    ] = 2048,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the random signs and the windows' places.", rich_help_panel=DATA)
    ] = 0,
    data_root: DataRoot = None,
    device: Device = DeviceName.AUTO,
) -> None:
    """Quantize a model to INT4 weights, activations and KV cache, without training.

    Rotations are folded into the weights; layer after layer is calibrated on text, rounded with GPTQ and
    packed. OUT is an ordinary Hugging Face folder that loads with AutoModelForCausalLM once rrsq is imported;
    it appears whole or not at all.
    """
    from rrsq.recipe import load_recipe

    chosen = load_recipe(recipe, assignments or ())
    _run(
        model,
        output,
        chosen,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        calibration_data=calibration_data,
        num_samples=num_samples,
        sequence_length=sequence_length,
        seed=seed,
        data_root=data_root,
        device=device,
    )


def _run(
    model_path: str,
    output: Path,
    recipe: Recipe,
    *,
    overwrite: bool,
    max_shard_size: str,
    calibration_data: str,
    num_samples: int,
    sequence_length: int,
    seed: int,
    data_root: Path | None,
    device: DeviceName,
) -> None:
    from rrsq.calibration.text import load_documents
    from rrsq.calibration.windows import calibration_windows, data_fingerprint
    from rrsq.checkpoint.format import CalibrationInfo
    from rrsq.checkpoint.loading import load_model, load_tokenizer
    from rrsq.checkpoint.writer import check_output, check_space, checkpoint_info, write_checkpoint
    from rrsq.quantization.memory import least_checkpoint_bytes
    from rrsq.quantization.pipeline import needs_calibration, quantize_model

    check_output(output, overwrite=overwrite)
    quiet_libraries()
    device_name = resolve_device(device)
    _check_source(model_path, data_root)
    with progress_bar() as progress:
        bar = progress.add_task("tokenizer and calibration text", total=None)
        tokenizer = load_tokenizer(model_path, data_root)
        windows, calibration = None, None
        if needs_calibration(recipe):
            documents = load_documents(calibration_data, split="train", data_root=data_root)
            windows = calibration_windows(tokenizer, documents, num_samples, sequence_length, seed)
            calibration = CalibrationInfo(
                source=calibration_data,
                num_samples=windows.shape[0],
                sequence_length=windows.shape[1],
                fingerprint=data_fingerprint(windows),
            )
        progress.update(bar, description="loading the model")
        model: Any = load_model(model_path, device="cpu", data_root=data_root)
        check_space(output, least_checkpoint_bytes(model, recipe))
        progress.update(bar, description="quantizing", total=1)
        layers = model.config.num_hidden_layers
        layer_bar = progress.add_task("layer", total=None)

        def show(done: int, total: int, text: str) -> None:
            steps = total // layers
            step = (done - 1) % steps
            if step == 0:
                progress.reset(layer_bar, total=steps)
            progress.update(layer_bar, completed=step + 1, description=text)
            progress.update(bar, completed=done, total=total)

        quantized = quantize_model(model, recipe, windows, seed=seed, device=device_name, progress=show)
        progress.update(bar, description="writing the checkpoint")
        info = checkpoint_info(
            quantized,
            seed=seed,
            source_model=model_path.rstrip("/").rsplit("/", 1)[-1],
            calibration=calibration,
        )
        write_checkpoint(
            quantized, tokenizer, info, output, overwrite=overwrite, max_shard_size=max_shard_size
        )
        progress.update(bar, description="done")
    stdout.print(_summary(info, output, quantized.report))
    print_note(f"Next: rrsq eval {output} --baseline {model_path}")


def _check_source(model_path: str, data_root: Path | None) -> None:
    """Refuse a model that cannot be quantized before anything large is read."""
    from rrsq.checkpoint.loading import load_config
    from rrsq.models import family_for

    config = load_config(model_path, data_root)
    family_for(config)
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    if method is not None and not model_path.endswith(".gguf"):
        raise UsageError(
            f"'{model_path}' is quantized already ({method}). Quantize the original model, in 16 or 32 bits."
        )


def _summary(info: CheckpointInfo, output: Path, report: QuantizationReport) -> Table:
    """The table at the end of a run."""
    from rrsq.checkpoint.describe import describe_exceptions, describe_rotation

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
