"""What every command prints is readable in 80 columns, as in a pipe or the log of a build."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import rrsq.cli.tables as tables_module
from rrsq.benchmarking.whole.loads import Load, Measurement
from rrsq.benchmarking.whole.process import Outcome
from rrsq.benchmarking.whole.report import WholeReport, tables
from rrsq.cli.app import app
from rrsq.cli.console import stderr, stdout
from rrsq.cli.models import families_table, sizes_table
from rrsq.cli.recipes import fields_table
from rrsq.cli.tables import Rows, show_rows
from tiny_quantized import quantize_tiny, recipe_of, save_tiny

CUT = "\N{HORIZONTAL ELLIPSIS}"


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    for console in (stdout, stderr):
        monkeypatch.setattr(console, "_width", 80)


def in_eighty_columns(*arguments: object) -> str:
    """What a command prints, a word of which is nowhere cut."""
    done = CliRunner().invoke(app, [str(each) for each in arguments])
    assert done.exit_code == 0, done.output
    assert CUT not in done.output
    for line in done.stdout.splitlines():
        assert len(line.rstrip()) <= 80, line
    return done.stdout


@pytest.mark.parametrize("rows", [families_table, sizes_table, fields_table])
@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_no_word_of_a_table_is_cut(rows: object, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(tables_module, "stdout", Console(file=file, width=width))
    made: Rows = rows()  # type: ignore[operator]
    show_rows(made, markdown=False)
    output = file.getvalue()
    assert max(len(line.rstrip()) for line in output.splitlines()) <= width
    assert CUT not in output
    printed = set(output.replace("│", " ").replace("┃", " ").split())
    words = {word for row in made[1:] for cell in row for word in cell.split()}
    # In a list a word longer than the line is folded: as a file would be, it is not there whole.
    assert {word for word in words if len(word) < 40} <= printed


def test_a_wide_terminal_shows_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(tables_module, "stdout", Console(file=file, width=300))
    show_rows(sizes_table(), markdown=False)
    assert len(file.getvalue().splitlines()) == len(sizes_table()) + 3


@pytest.mark.parametrize("arguments", [["models"], ["recipes"], ["recipes", "--fields"]])
def test_lists(arguments: list[str]) -> None:
    in_eighty_columns(*arguments)


def test_what_is_said_of_a_model_and_a_checkpoint(tiny_llama_dir: Path, tmp_path: Path) -> None:
    checkpoint = save_tiny(
        quantize_tiny(tiny_llama_dir, recipe_of("rrs-w4a4kv4")), tiny_llama_dir, tmp_path / "rrs-w4a4kv4"
    )
    output = in_eighty_columns("inspect", checkpoint, "--layers")
    assert "gate_up" in output
    dry = ("quantize", tiny_llama_dir, "-o", tmp_path / "none", "--dry-run")
    for command in (("inspect", tiny_llama_dir), ("doctor", tiny_llama_dir), ("doctor", checkpoint), dry):
        assert "mlp.gate_up" in in_eighty_columns(*command)


def test_quantize(tiny_llama_dir: Path, tiny_hub: Path, tmp_path: Path) -> None:
    text = ("--num-samples", 2, "--sequence-length", 32, "--data-root", tiny_hub, "--device", "cpu")
    output = in_eighty_columns("quantize", tiny_llama_dir, "-o", tmp_path / "out", *text)
    assert "lowest output SNR" in output


def test_bench() -> None:
    output = in_eighty_columns(
        "bench", "--shape", "64x64", "--tokens", "1,4", "--seconds", 0, "--device", "cpu"
    )
    assert "rrsq-float-scales" in output


def test_times_of_whole_models() -> None:
    load = Load(16, 32768)
    times = (Measurement(16, 32768, 1234.567, 123456.7, 1234.567, 123456.7),)
    outcomes = tuple(
        Outcome(name, None, "NVIDIA H100 80GB HBM3", 16_060_522_496, 123_456, 73_456_789_012, 123.0, times)
        for name in ("bf16", "bf16-static", "rrsq")
    )
    report = WholeReport("llama-3-8b", "rrs-w4a4kv4", "vllm", "rrsq bench", 64, 3, (load,), outcomes, {})
    file = io.StringIO()
    console = Console(file=file, width=80)
    for table in tables(report):
        console.print(table)
    output = file.getvalue()
    assert max(map(len, output.splitlines())) <= 80
    assert CUT not in output
    assert output.count("123456.7") == 3
    assert output.count("1234.567") == 3
