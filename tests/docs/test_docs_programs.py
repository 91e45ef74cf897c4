"""The Python programs, the recipe and the computed numbers of README.md and docs/ are right."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import yaml

from doc_pages import PAGES, REPOSITORY, fences
from doc_runners import run_script
from rrsq.models import LinearInput, ModelFamily, families, registry
from rrsq.models.olmo2 import OLMO2
from rrsq.recipe import load_recipe

DOCS = REPOSITORY / "docs"
PROGRAMS = [
    (page.name, index, code)
    for page in PAGES
    for index, code in enumerate(fences(page, "python"))
    if page.name != "adding-a-model.md"
]


@pytest.mark.parametrize(
    "code", [code for *_, code in PROGRAMS], ids=[f"{page}-{index}" for page, index, _ in PROGRAMS]
)
def test_documented_program_runs(code: str, documented: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(documented)
    monkeypatch.setenv("RRSQ_DATA_ROOT", "hub")
    if "from vllm" in code:  # It needs a GPU.
        monkeypatch.setitem(sys.modules, "vllm", MagicMock())
    exec(code.replace('"cuda"', '"cpu"').replace("limit=24", "limit=2, sequence_length=64"), {})


def test_the_documented_family_is_the_one_in_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    family, registration = fences(DOCS / "adding-a-model.md", "python")
    names = {"ModelFamily": ModelFamily, "LinearInput": LinearInput}
    exec(family, names)
    assert names["OLMO2"] == dataclasses.replace(OLMO2, public={})
    monkeypatch.setattr(registry, "_FAMILIES", {})
    exec(registration, {"MY_FAMILY": OLMO2})
    assert families() == [OLMO2]


def test_the_documented_exceptions_are_those_of_a_recipe(tmp_path: Path) -> None:
    (fence,) = fences(DOCS / "recipes.md", "yaml")
    recipe = load_recipe("rrs-w4a4kv4").model_dump(mode="json") | yaml.safe_load(fence)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(recipe))
    loaded = load_recipe(str(path))
    assert loaded.head.bits == 8
    assert loaded.modules_to_not_convert == ("*.layers.0.*", "*.v_proj")
    down, layer = loaded.overrides
    assert (down.match, down.activations.bits, layer.weights.group_size) == ("*.mlp.down", 8, 16)


def test_documented_projections_are_what_the_command_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (DOCS / "reliability.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (Llama-\S+) \| ([\d.]+) GB \| ([\d.]+) GB \| ([\d.]+) GB \|$", text, re.MULTILINE)
    assert len(rows) == 2
    for shape, device, beside, activations in rows:
        run_script(["examples/big_model.py", "project", "--shape", shape], monkeypatch)
        printed = [float(number) for number in re.findall(r"([\d.]+) GB", capsys.readouterr().out)]
        host = pytest.approx(float(beside) + float(activations), abs=0.11)  # Of two rounded numbers.
        assert printed == [float(device), host, float(activations)]
