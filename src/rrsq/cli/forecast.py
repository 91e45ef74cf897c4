"""The tables of ``rrsq quantize --dry-run``, and of ``rrsq inspect`` on a model that is not quantized."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from rrsq.cli.console import human_bytes, print_note, printable, stdout
from rrsq.cli.doctor import report_kernels

if TYPE_CHECKING:
    from rrsq.quantizer.forecast import Forecast
    from rrsq.recipe import Recipe

__all__ = ["print_forecast"]


def print_forecast(
    model: str,
    recipe: Recipe,
    *,
    num_samples: int,
    sequence_length: int,
    device: str,
    data_root: Path | None = None,
    offloaded: bool = False,
) -> None:
    """Say what quantizing a model would give, and which kernels would serve the checkpoint.

    Args:
        model, recipe, num_samples, sequence_length, data_root, offloaded: as
            :func:`rrsq.quantizer.forecast.forecast` takes them.
        device: ``cpu`` or ``cuda``, where it would be quantized.
    """
    from rrsq.quantizer.forecast import forecast

    found = forecast(
        model,
        recipe,
        num_samples=num_samples,
        sequence_length=sequence_length,
        data_root=data_root,
        offloaded=offloaded,
    )
    stdout.print(_table(model, found, num_samples, sequence_length, device))
    stdout.print()
    report_kernels(model, recipe, data_root)
    print_note("From the model's configuration alone: no weight was read. How long it takes is not forecast.")


def _table(model: str, found: Forecast, num_samples: int, sequence_length: int, device: str) -> Table:
    from rrsq.quantizer.needs import needs_calibration
    from rrsq.runtime.format.describe import (
        describe_activations,
        describe_cache,
        describe_embedding,
        describe_exceptions,
        describe_head,
        describe_rotation,
        describe_weights,
        shares_head,
        stored_bits,
    )

    info = found.info
    before, after = found.bytes_before, found.bytes_after
    text = f"{num_samples} windows of {sequence_length} tokens" if num_samples else "stored statistics"
    kept = ", ".join(f"{path} ({count} layers)" for path, count in found.kept.items())
    exceptions = describe_exceptions(info)
    rows = (
        ("architecture", found.architecture),
        ("parameters", f"{found.parameters / 1e6:.1f} M, {found.dtype}"),
        ("recipe", info.recipe.name),
        ("weights", describe_weights(info)),
        ("activations", describe_activations(info)),
        ("KV cache", describe_cache(info)),
        ("embedding", describe_embedding(info)),
        ("output head", describe_head(info, shared=shares_head(info, found.contents))),
        *([("except", exceptions)] if exceptions else []),
        ("linears kept in 16 bits", kept or "none in the layers"),
        ("rotation", describe_rotation(info)),
        ("calibration", text if needs_calibration(info.recipe) else "none needed"),
        ("size of weights", f"{human_bytes(before)} → {human_bytes(after)} ({after / before:.0%})"),
        ("bits per weight", stored_bits(found.contents)),
        ("bits of linears", str(found.linear_bits or "none is quantized")),
        ("memory to quantize", found.memory.describe(device).removeprefix("Projected peak: ")),
    )
    table = Table(title=printable(model), show_header=False, title_justify="left")
    for label, value in rows:
        table.add_row(label, printable(value))
    return table
