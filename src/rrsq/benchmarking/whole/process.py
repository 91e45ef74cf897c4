"""One contender in one process: what it is asked, what it gives, and why it gave nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .loads import Load, Measurement

__all__ = ["Job", "Outcome", "run_in_process"]

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
_LOG_LINES = 40


@dataclass(frozen=True)
class Job:
    """A contender and what to ask of it.

    Attributes:
        name: of the contender.
        engine: ``vllm`` or ``transformers``.
        folder: of the model's files; None: weights are random.
        description: ``config.json`` where there is no folder.
        options: of the engine.
        loads: what to time.
        new_tokens: see :func:`~.loads.measure`.
        repeats: of each run.
    """

    name: str
    engine: str
    folder: str | None
    description: Mapping[str, Any] | None
    options: Mapping[str, Any]
    loads: Sequence[Load]
    new_tokens: int
    repeats: int


@dataclass(frozen=True)
class Outcome:
    """What a contender took; without measurements, for the ``reason``, if it did not run.

    Attributes:
        name: of the contender.
        reason: why it gave nothing, or stopped before all loads were timed; None if all is there.
        device: where it ran.
        weight_bytes: of one process.
        cache_tokens: that fit into the KV cache of one engine; None where that is not set aside.
        peak_bytes: of the device's memory; None where it says nothing.
        start_seconds: from nothing to the first request.
        measurements: one a load.
        log: the end of what it said, if it failed.
    """

    name: str
    reason: str | None = None
    device: str = ""
    weight_bytes: int = 0
    cache_tokens: int | None = None
    peak_bytes: int | None = None
    start_seconds: float = 0.0
    measurements: tuple[Measurement, ...] = ()
    log: tuple[str, ...] = field(default=(), repr=False)

    def measurement(self, load: Load) -> Measurement | None:
        """That of a load, or None."""
        found = (
            each for each in self.measurements if (each.batch, each.context) == (load.batch, load.context)
        )
        return next(found, None)


def run_in_process(job: Job) -> Outcome:
    """Start a process, load a contender in it, and time it.

    It is given a folder with ``job.json`` (and ``config.json``, where the weights are random) and writes
    ``result.json`` there after each load, so that what was measured before it failed is kept.
    """
    import os

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        if job.description is not None:
            (path / "config.json").write_text(json.dumps(job.description), encoding="utf-8")
        (path / "job.json").write_text(json.dumps(asdict(job)), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "rrsq.benchmarking.whole.worker", folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            env={**_ENVIRONMENT, **os.environ},
            check=False,
        )
        result = path / "result.json"
        data = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
    data["measurements"] = tuple(Measurement(**each) for each in data.get("measurements", ()))
    failed = done.returncode != 0 or data.get("reason") is not None
    if failed:
        said = [line.rstrip() for line in done.stdout.splitlines() if line.strip()]
        data["reason"] = _reason(data.get("reason"), said, done.returncode)
        data["log"] = tuple(said[-_LOG_LINES:])
    return Outcome(**{"name": job.name, **data})


def _reason(own: str | None, said: Sequence[str], code: int) -> str:
    """One line: the exception that ended it, or the one behind it in a process that it had started."""
    if code < 0:
        return f"its process was ended by signal {-code}" + (" (out of memory?)" if code == -9 else "")
    if own is not None and "root cause above" not in own:
        return own
    # A worker's exception, as vLLM logs it: "(EngineCore pid=7) ERROR ... ValueError: ...".
    errors = [match[1] for line in said if (match := re.search(r"\b((?:\w+\.)*\w+Error: .+)$", line))]
    causes = [error for error in errors if "root cause above" not in error]
    return causes[-1] if causes else own or (said[-1] if said else f"it ended with exit code {code}")
