"""A quantization in a process of its own, to be killed."""

from __future__ import annotations

import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from forked import forked
from tiny_quantized import random_tokens


def produce(model: Path, out: Path, *, recipe: str = "rrs-w4a4kv4", windows: int = 8, **options: Any) -> Any:
    """What ``rrsq quantize`` does with a model of this folder and random tokens, on one thread.

    A file beside ``out`` says when the tokenizer is loaded and the rest begins.
    """
    import torch

    from rrsq.quantizer.calibration.workers import joined_workers

    torch.set_num_threads(1)
    with joined_workers(torch.device("cpu")) as workers:
        return _produce(model, out, recipe, windows, workers, options)


def _produce(model: Path, out: Path, recipe: str, windows: int, workers: Any, options: dict[str, Any]) -> Any:
    from rrsq.quantizer.calibration.windows import data_fingerprint
    from rrsq.quantizer.options import QuantizationOptions
    from rrsq.quantizer.production.produce import Calibration, OutputOptions, SourceModel, produce_checkpoint
    from rrsq.recipe import load_recipe
    from rrsq.runtime.format.format import CalibrationInfo
    from rrsq.runtime.format.loading import load_tokenizer

    tokenizer = load_tokenizer(str(model))
    tokens = random_tokens(windows, 32)
    info = CalibrationInfo(
        source="random", num_samples=windows, sequence_length=32, fingerprint=data_fingerprint(tokens)
    )
    seed = options.pop("seed", 0)
    begun(out).touch()
    return produce_checkpoint(
        SourceModel(str(model), tokenizer),
        load_recipe(recipe, ()),
        OutputOptions(out, max_shard_size="60KB", **options),
        Calibration(tokens, info),
        QuantizationOptions(seed, workers=workers),
    )


def begun(out: Path) -> Path:
    """The file that :func:`produce` makes when it has begun."""
    return out.parent / "begun"


def _produce_with(model: Path, out: Path, options: dict[str, Any]) -> None:
    produce(model, out, **options)


def started(
    model: Path, out: Path, environment: dict[str, str] | None = None, *, wait: bool = True, **options: Any
) -> ForkServerProcess:
    """A process that runs :func:`produce`, and has begun unless ``wait`` is False."""
    begun(out).unlink(missing_ok=True)
    process = forked(_produce_with, model, out, options, environment=environment)
    while wait and not begun(out).exists() and process.exitcode is None:
        time.sleep(0.001)
    return process
