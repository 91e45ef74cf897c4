"""``rrsq calibrate``: measure a model's activations once, keep what quantize needs, show what will hurt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from rrsq.cli.console import (
    examples,
    human_bytes,
    print_note,
    print_warning,
    progress_bar,
    quiet_libraries,
    stdout,
)
from rrsq.cli.options import (
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
    resolve_device,
)

if TYPE_CHECKING:
    from rich.progress import Progress

    from rrsq.diagnostics.outliers import OutlierReport
    from rrsq.quantizer.calibration.manifest import CalibrationManifest
    from rrsq.quantizer.production.produce import Calibration
    from rrsq.recipe import Recipe

__all__ = ["EXAMPLES", "calibrate"]

EXAMPLES = examples(
    "rrsq calibrate meta-llama/Meta-Llama-3-8B -o calib/",
    "rrsq calibrate ./model -o calib/ --no-hessians --num-samples 8 --sequence-length 512",
)


def calibrate(
    model: Model,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="CALIB", help="Folder to write to.", rich_help_panel=OUTPUT),
    ],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace CALIB if it exists.", rich_help_panel=OUTPUT)
    ] = False,
    restart: Restart = False,
    hessians: Annotated[
        bool,
        typer.Option(
            "--hessians/--no-hessians",
            help="Store the input Hessians, which GPTQ needs and which are nearly all of the folder's size."
            " Without them the folder is little more than the report.",
            rich_help_panel=OUTPUT,
        ),
    ] = True,
    recipe: Annotated[
        str,
        typer.Option(
            help="Recipe whose rotation, smoothing and grids the report shows, by name or path. The Hessians"
            " serve every recipe.",
            rich_help_panel=RECIPE,
        ),
    ] = "rrs-w4a4kv4",
    assignments: Assignments = None,
    calibration_data: CalibrationData = "wikitext2",
    num_samples: NumSamples = 128,
    sequence_length: SequenceLength = 2048,
    seed: Seed = 0,
    bos: Bos = BosName.AUTO,
    data_root: DataRoot = None,
    device: Device = DeviceName.AUTO,
) -> None:
    """Run text through a model once; store what quantize can reuse and report what will hurt.

    CALIB/report.html shows the outlier channels and spike tokens of every linear input, before and after
    rotation and smoothing, and the error that quantization makes there. 'rrsq quantize --calibration CALIB'
    then needs no text, for any recipe. The stored Hessians are those of the full-precision model; quantize
    by itself uses those of the already quantized layers before each layer, which is a bit more accurate.

    A run that was stopped, however it was, goes on with the same command.
    """
    from rrsq.diagnostics.make_manifest import check_covered
    from rrsq.quantizer.calibration.manifest import MANIFEST_NAME
    from rrsq.quantizer.production.produce import CalibrationText, check_source, load_calibration
    from rrsq.recipe import load_recipe
    from rrsq.runtime.format.loading import load_tokenizer
    from rrsq.storage import check_output
    from rrsq.work_folder import was_published

    chosen = load_recipe(recipe, assignments or ())
    if restart or not was_published(output):
        check_output(output, overwrite=overwrite, marker=MANIFEST_NAME, kind="a calibration folder")
    quiet_libraries()
    device_name = resolve_device(device)
    family = check_source(model, data_root)
    check_covered(family)
    with progress_bar() as progress:
        bar = progress.add_task("tokenizer and calibration text", total=None)
        tokenizer = load_tokenizer(model, data_root)
        text = CalibrationText(calibration_data, num_samples, sequence_length, seed, bos.value)
        calibration = load_calibration(tokenizer, family, text, data_root)
        progress.remove_task(bar)
        report, size = _run(
            model,
            output,
            chosen,
            tokenizer,
            calibration,
            progress,
            overwrite=overwrite,
            restart=restart,
            hessians=hessians,
            seed=seed,
            data_root=data_root,
            device=device_name,
        )
    stdout.print(_worst(report))
    print_note(f"Wrote {output} ({human_bytes(size)}). Open {output / 'report.html'}")
    if hessians:
        print_note(f"Next: rrsq quantize {model} -o out/ --calibration {output}")


def _run(
    path: str,
    output: Path,
    recipe: Recipe,
    tokenizer: Any,
    calibration: Calibration,
    progress: Progress,
    *,
    overwrite: bool,
    restart: bool,
    hessians: bool,
    seed: int,
    data_root: Path | None,
    device: str,
) -> tuple[OutlierReport, int]:
    """Load the model, say what the run will take, run, write the report; return it and the folder's bytes."""
    from rrsq.diagnostics.layer_pass import calibrate_layers
    from rrsq.diagnostics.make_manifest import calibration_work, make_manifest
    from rrsq.diagnostics.outliers import read_report
    from rrsq.diagnostics.write import write_report
    from rrsq.quantizer.calibration.stored import StoredCalibration
    from rrsq.runtime.format.loading import load_model
    from rrsq.storage import flush

    windows, info = calibration.windows, calibration.info
    assert windows is not None
    bar = progress.add_task("loading the model", total=None)
    model: Any = load_model(path, device="cpu", data_root=data_root)
    name = path.rstrip("/").rsplit("/", 1)[-1]
    manifest = make_manifest(
        model,
        name,
        windows,
        recipe,
        source=info.source,
        bos_each_window=info.bos_each_window,
        seed=seed,
        hessians=hessians,
    )
    _state_sizes(model, manifest, output)

    def show(done: int, total: int, text: str) -> None:
        progress.update(bar, completed=done, total=total, description=text)

    with calibration_work(output, manifest, restart=restart) as work:
        if work.manifest.finished:
            print_note(f"Going on: {work.manifest.finished} of {manifest.layers} layers are finished.")
        if not work.manifest.whole:
            calibrate_layers(
                model, windows, manifest, work.staging, device=device, progress=show, on_layer=work.advance
            )
        progress.update(bar, description="figures")
        report = read_report(StoredCalibration(work.made), windows, tokenizer)
        if not work.manifest.whole:
            write_report(report, work.staging, lambda done, total: show(done, total, "figures"))
            flush(work.staging)
            work.finish()
        work.publish(overwrite=overwrite)
    progress.update(bar, description="done")
    return report, sum(file.stat().st_size for file in output.rglob("*") if file.is_file())


def _state_sizes(model: Any, manifest: CalibrationManifest, output: Path) -> None:
    """Say what the run takes; refuse a disk without room, warn of too little memory."""
    import shutil

    import psutil

    from rrsq.diagnostics.sizes import expected_sizes
    from rrsq.quantizer.memory import weight_bytes
    from rrsq.storage import check_space
    from rrsq.work_folder import work_path

    loaded = weight_bytes(model)
    expected = expected_sizes(
        manifest.inputs,
        layers=manifest.layers,
        hidden=model.config.get_text_config().hidden_size,
        model_bytes=loaded,
        num_samples=manifest.num_samples,
        sequence_length=manifest.sequence_length,
        hessians=manifest.hessians,
    )
    work = work_path(output)
    there = sum(file.stat().st_size for file in work.rglob("*")) if work.is_dir() else 0
    check_space(output, expected.disk - there, "the calibration takes")
    free = shutil.disk_usage(output.absolute().parent).free
    print_note(
        f"On the disk: {human_bytes(expected.hessians)} of Hessians and up to"
        f" {human_bytes(expected.report)} for the report and other statistics ({human_bytes(free)} free)."
        f" In memory: about {human_bytes(expected.memory)} with the model."
    )
    available = psutil.virtual_memory().available + loaded
    if expected.memory > available:
        print_warning(
            f"The run needs about {human_bytes(expected.memory)} of memory and {human_bytes(available)} are"
            " available. Fewer or shorter windows (--num-samples, --sequence-length) need less."
        )


def _worst(report: OutlierReport) -> Table:
    """The inputs of the largest output error."""
    table = Table(
        "layer", "input", "max/RMS\nbefore", "after\nrotation", "after\nsmoothing", "output\nerror",
        title=f"The {len(report.worst)} inputs that quantization hurts most ({report.manifest.recipe.name})",
        title_justify="left",
        caption="max/RMS: of a token, mean. Output error: ‖Δy‖/‖y‖, weights rounded to nearest.",
        caption_justify="left",
    )  # fmt: skip
    for column in table.columns:
        column.justify = "right"
    for row in report.worst:
        table.add_row(
            str(row.layer),
            row.input,
            *(f"{ratio:.1f}" for ratio in row.ratio.values()),
            f"{row.output_error:.1%}",
        )
    return table
