"""The process of a contender, started by process.py: ``python -m rrsq.benchmarking.whole.worker FOLDER``."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .loads import Load, measure
from .models import open_model

__all__ = ["main"]


def main(folder: Path) -> None:
    """Do what ``job.json`` in the folder asks for, and write ``result.json`` there."""
    result: dict[str, Any] = {"measurements": []}
    try:
        _run(folder, json.loads((folder / "job.json").read_text(encoding="utf-8")), result)
    except Exception as error:  # Anything that a model or an engine may raise is this contender's result.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        result["reason"] = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
        _write(folder, result)
        raise


def _run(folder: Path, job: dict[str, Any], result: dict[str, Any]) -> None:
    loads = [Load(**load) for load in job["loads"]]
    begin = time.perf_counter()
    model = open_model(
        job["engine"],
        folder if job["folder"] is None else Path(job["folder"]),
        has_files=job["folder"] is not None,
        options=job["options"],
        longest=max(load.context for load in loads) + job["new_tokens"],
        most=max(load.batch for load in loads),
    )
    result |= {
        "start_seconds": time.perf_counter() - begin,
        "device": model.device,
        "weight_bytes": model.weight_bytes,
        "cache_tokens": model.cache_tokens,
    }
    _write(folder, result)
    for load in loads:
        measured = measure(model.generate, load, model.vocabulary, job["new_tokens"], job["repeats"])
        result["measurements"].append(asdict(measured))
        result["peak_bytes"] = model.peak_bytes()
        _write(folder, result)


def _write(folder: Path, result: dict[str, Any]) -> None:
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
