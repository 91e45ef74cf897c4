"""Progress where stderr is no terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from rrsq.cli import console as module


@pytest.mark.parametrize(
    ("terminal", "expected"), [(False, ["layer 0 (0 of 4)", "layer 2 (2 of 4)"]), (True, [])]
)
def test_a_line_every_half_minute(
    terminal: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
    monkeypatch.setattr(module, "stderr", console)
    progress = module.progress_bar()
    progress.live.auto_refresh = False
    bar = progress.add_task("", total=4)
    for layer in range(4):
        progress.update(bar, completed=layer, description=f"layer {layer}")
        now += 16
    assert isinstance(console.file, io.StringIO)
    assert [line.split(",")[0] for line in console.file.getvalue().splitlines()] == expected
