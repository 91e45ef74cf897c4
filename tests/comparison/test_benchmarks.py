"""Files of ``rrsq bench --whole`` in a comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rrsq.benchmarking.whole.loads import Load, Measurement
from rrsq.benchmarking.whole.process import Outcome
from rrsq.benchmarking.whole.report import WholeReport
from rrsq.comparison.benchmarks import read_benchmarks
from rrsq.errors import UsageError


def written(path: Path, recipe: str, decode: float, base: float) -> Path:
    """What the command writes."""
    outcomes = tuple(
        Outcome(name, device="a GPU", peak_bytes=peak, measurements=(Measurement(2, 128, ms, 9.0, ms, 9.0),))
        for name, peak, ms in (("bf16", 900, base), ("rrsq", 300, decode))
    )
    report = WholeReport("out", recipe, "transformers", "c", 8, 3, (Load(2, 128),), outcomes, {})
    path.write_text(json.dumps(report.to_dict()))
    return path


def test_speeds_and_memory_of_each_recipe_and_of_full_precision(tmp_path: Path) -> None:
    first = written(tmp_path / "a.json", "rrs-w4a4kv4", 4.0, 10.0)
    second = written(tmp_path / "b.json", "quarot-w4a4kv4", 5.0, 11.0)
    found = read_benchmarks([first, second], ["quarot-w4a4kv4", "rrs-w4a4kv4"])
    assert {one.subject: one.tokens_per_second for one in found} == {
        "rrs-w4a4kv4": {"2x128": 500.0},
        "full-precision": {"2x128": 200.0},
        "quarot-w4a4kv4": {"2x128": 400.0},
    }
    assert [one.peak_bytes for one in found] == [300, 900, 300]


@pytest.mark.parametrize(
    "content", ["{}", "[]", "no JSON", '{"recipe": "a", "engine": "b", "outcomes": []}', None]
)
def test_other_files_are_refused(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match="this is no file of 'rrsq bench --whole"):
        read_benchmarks([path], ["a"])


def test_a_file_of_another_recipe_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", "rrs-w4a4kv4", 4.0, 10.0)
    with pytest.raises(UsageError, match="of recipe 'rrs-w4a4kv4', which is not compared here"):
        read_benchmarks([path], ["rtn-w4a4"])
