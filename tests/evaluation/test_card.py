"""``rrsq eval --update-card``: results in a checkpoint's model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rrsq.cli.app import app
from rrsq.evaluation.card import BEGIN, END
from tiny_quantized import quantize_tiny, recipe_of, save_tiny

OPTIONS = ("--device", "cpu", "--dtype", "float32", "--sequence-length", "64", "--limit", "2")


def rrsq_eval(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["eval", *map(str, arguments), *OPTIONS])


@pytest.fixture
def checkpoint(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    return save_tiny(quantize_tiny(tiny_llama_dir, recipe_of("rtn-w4a4")), tiny_llama_dir, tmp_path / "out")


def test_results_are_written_once_and_replaced(
    tiny_llama_dir: Path, checkpoint: Path, tiny_text_file: Path
) -> None:
    card = checkpoint / "README.md"
    original = card.read_text(encoding="utf-8")
    tasks = ("--tasks", f"text:{tiny_text_file},kl:{tiny_text_file}")
    # The folder may be written in another way than the model.
    numbers = checkpoint.with_name("numbers.json")
    command = (tiny_llama_dir, checkpoint, *tasks, "--update-card", f"{checkpoint}/", "--json", numbers)
    done = rrsq_eval(*command)
    assert done.exit_code == 0, done.output
    assert f"Wrote {card}" in done.stderr
    written = card.read_text(encoding="utf-8")
    assert written.startswith(original.rstrip())
    report = json.loads(numbers.read_text(encoding="utf-8"))
    full, value = (model["results"][0]["metrics"][0]["value"] for model in report["models"])
    row = f"| text:{tiny_text_file} | perplexity | {value:.4f} | {full:.4f} | ×{value / full:.3f} |"
    assert row in written
    assert "first token of a window is not predicted" in written
    assert "Full precision is tiny-llama." in written
    assert rrsq_eval(*command).exit_code == 0
    assert card.read_text(encoding="utf-8") == written
    edited = written.replace(END, f"{END}\n\n## Mine\n\nA note.") + "\n"
    card.write_text(edited, encoding="utf-8")
    alone = rrsq_eval(checkpoint, "--tasks", f"text:{tiny_text_file}", "--update-card", checkpoint)
    assert alone.exit_code == 0, alone.output
    again = card.read_text(encoding="utf-8")
    assert again.startswith(original.rstrip())
    assert again.endswith("## Mine\n\nA note.\n")
    assert again.count(BEGIN) == again.count(END) == again.count("## Results") == 1
    assert "kl_mean" not in again
    assert "full precision |" not in again[again.index(BEGIN) :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "name it among the models too"),
        (lambda card: card.unlink(), "cannot be read"),
        (lambda card: card.write_text(f"{END} {BEGIN}"), "must stand there once"),
        (lambda card: card.write_text(f"{BEGIN} {BEGIN} {END}"), "must stand there once"),
        (lambda card: card.write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    ],
)
def test_a_card_that_cannot_be_updated_is_refused_before_anything_is_measured(
    tiny_llama_dir: Path, checkpoint: Path, tiny_text_file: Path, change: Any, message: str
) -> None:
    models = [tiny_llama_dir, checkpoint]
    if change is None:
        models = [tiny_llama_dir]
    else:
        change(checkpoint / "README.md")
    done = rrsq_eval(*models, "--tasks", f"text:{tiny_text_file}", "--update-card", checkpoint)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert "perplexity" not in done.stdout


def test_a_model_that_is_not_quantized_has_no_card(tiny_llama_dir: Path, tiny_text_file: Path) -> None:
    done = rrsq_eval(tiny_llama_dir, "--tasks", f"text:{tiny_text_file}", "--update-card", tiny_llama_dir)
    assert done.exit_code in (1, 2)
    assert "none that rrsq quantized" in " ".join(done.stderr.split())
    assert not (tiny_llama_dir / "README.md").exists()
