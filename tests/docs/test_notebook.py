"""The notebook of examples/ runs from top to bottom, with a smaller model."""

from __future__ import annotations

import contextlib
import io
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

from doc_pages import REPOSITORY

NOTEBOOK = REPOSITORY / "examples" / "quickstart.ipynb"
SIZES = "HIDDEN_SIZE, LAYERS, STEPS = 128, 4, 300"


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert sum(SIZES in cell for cell in cells) == 1
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names: dict[str, Any] = {}
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        for cell in cells:
            exec(cell.replace(SIZES, "HIDDEN_SIZE, LAYERS, STEPS = 32, 2, 20"), names)
    printed = output.getvalue()
    # Two layers and two perplexities, which the training has brought far below that of chance.
    assert len(re.findall(r"^layer \d: output SNR \d+\.\d dB$", printed, re.MULTILINE)) == 2
    values = re.findall(r"^(model|out) perplexity ([\d.]+)$", printed, re.MULTILINE)
    assert [name for name, _ in values] == ["model", "out"]
    assert all(1 < float(value) < 500 for _, value in values)
    assert "The river" in printed.splitlines()[-1]


def test_the_notebook_is_stored_without_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
