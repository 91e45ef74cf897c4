"""What examples/serving_parity.py makes of two runs; it needs no vLLM for that."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).parents[2] / "examples" / "serving_parity.py"


@pytest.fixture(scope="module")
def parity() -> Any:
    spec = importlib.util.spec_from_file_location("serving_parity", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["serving_parity"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text(tokens: list[int], gaps: list[float], second: int = 9) -> dict[str, Any]:
    return {"tokens": tokens, "best": [[token, second] for token in tokens], "gap": gaps}


def test_the_same(parity: Any, capsys: pytest.CaptureFixture[str]) -> None:
    ours = [text([1, 2], [3.0, 1.0])]
    assert parity.report("runs", ours, [text([1, 2], [3.5, 1.25])])
    assert "1 the same, 0 part, 0 lost" in capsys.readouterr().out
    assert parity.compare(ours, [text([1, 2], [3.5, 1.25])])[2] == [0.25, 0.5]


@pytest.mark.parametrize(
    ("gap", "token", "good"), [(0.4, 9, True), (0.6, 9, False), (0.4, 8, False)], ids=["tie", "gap", "third"]
)
def test_a_text_that_parts(parity: Any, gap: float, token: int, good: bool) -> None:
    """Explained by a gap that is no wider than gaps differ anyway, 0.5, and only by the second best token."""
    ours = [text([1, 2, 3], [3.0, 1.0, gap])]
    assert parity.report("runs", ours, [text([1, 2, token, 7], [3.5, 1.0, 0.0, 0.0])]) is good


def test_lost_and_cut_off_texts(parity: Any) -> None:
    ours = [text([1, 2], [3.0, 1.0])] * 3
    assert parity.compare(ours, [None, text([1], [3.0]), text([1, 2], [3.0, 1.0])])[1] == [0, 1]
    assert not parity.report("runs", ours, [None] * 3)


def test_requests_fit_and_share_beginnings(parity: Any) -> None:
    tokens = list(range(20000))
    requests = parity.requests_of(tokens, 200)
    assert len(requests) == 200
    assert all(len(r["prompt"]) + r["new"] <= parity.LONGEST for r in requests)
    assert sum(len(r["prompt"]) for r in requests) > 5 * parity.CACHE_TOKENS
    beginnings = [tuple(r["prompt"][:100]) for r in requests]
    assert len(set(beginnings)) < 100
    assert [r["step"] for r in requests] == sorted(r["step"] for r in requests)
