"""Mutated checkpoints end in one clear error, or load as if nothing had happened. See hostile/worker.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from hostile.case import Case
from hostile.cases import CASES
from tiny_quantized import quantize_tiny, recipe_of, save_tiny

PROCESSES = 2
TESTS = Path(__file__).resolve().parents[1]
# Peak memory that one case may add to the process: the tiny checkpoint takes 0.3 MB.
MEMORY = 400 * 2**20
SECONDS = 10.0


@pytest.fixture(scope="session")
def bases(tiny_qwen2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The untouched checkpoints."""
    folder = tmp_path_factory.mktemp("bases")
    quantized = quantize_tiny(tiny_qwen2_dir, recipe_of("rrs-w4a4kv4"))
    ordered = quantize_tiny(tiny_qwen2_dir, recipe_of("rrs-paper-w4a4kv4"))
    first = quantize_tiny(tiny_qwen2_dir, recipe_of("rrs1-w4a4kv4"))
    save_tiny(quantized, tiny_qwen2_dir, folder / "one")
    save_tiny(quantized, tiny_qwen2_dir, folder / "shards", max_shard_size="30KB")
    save_tiny(ordered, tiny_qwen2_dir, folder / "order")
    save_tiny(first, tiny_qwen2_dir, folder / "first")
    return {name: str(folder / name) for name in ("one", "shards", "order", "first")}


@pytest.fixture(scope="session")
def results(bases: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What each case gave, by its place in ``CASES``; run by the first process of xdist that asks."""
    base = tmp_path_factory.getbasetemp()
    file = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "hostile.json"
    with FileLock(file.with_suffix(".lock")):
        if not file.exists():
            file.write_text(json.dumps(_run_all(tmp_path_factory.mktemp("results"), bases)))
    return {int(index): result for index, result in json.loads(file.read_text()).items()}


def _run_all(folder: Path, bases: dict[str, str]) -> dict[int, dict[str, Any]]:
    (folder / "bases.json").write_text(json.dumps(bases))
    started = {first: _start(folder, first, first) for first in range(PROCESSES)}
    found: dict[int, dict[str, Any]] = {}
    while started:
        first, process = started.popitem()
        _, stderr = process.communicate(timeout=500)
        lines = [json.loads(line) for line in (folder / f"{first}.jsonl").read_text().splitlines()]
        found |= {line["index"]: line for line in lines if "index" in line}
        if process.returncode == 0:
            continue
        begun = [line["started"] for line in lines if "started" in line]
        assert begun, f"the worker did not start: {stderr}"
        found[begun[-1]] = {"crash": f"exit code {process.returncode}: {stderr[-2000:]}"}
        started[first] = _start(folder, first, begun[-1] + PROCESSES)
    return found


def _start(folder: Path, number: int, first: int) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "hostile.worker",
        str(folder / "bases.json"),
        str(folder / f"{number}.jsonl"),
    ]
    path = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [*command, str(first), str(PROCESSES)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(("index", "case"), [pytest.param(i, c, id=c.id) for i, c in enumerate(CASES)])
def test_a_mutated_checkpoint(index: int, case: Case, results: dict[int, dict[str, Any]]) -> None:
    result = results[index]
    assert "crash" not in result, result["crash"]
    assert not result["canary"], "code of the checkpoint was run"
    assert result["forbidden"] == []
    assert result["seconds"] < SECONDS
    assert result["memory"] < MEMORY
    allowed = {
        "error": ("error",),
        "same": ("same",),
        "either": ("error", "same"),
        "shown": ("error", "same", "other"),
        "own": ("error", "same", "other", "unclear"),
    }
    wrong = {
        entry: outcome
        for entry, outcome in result["results"].items()
        if outcome[0] not in allowed[case.expected[entry]]
    }
    assert not wrong, json.dumps(wrong, indent=2)


def test_there_are_enough_cases() -> None:
    assert len({case.id for case in CASES}) == len(CASES) >= 300
