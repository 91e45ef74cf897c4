"""``rrsq eval`` on tiny models, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from rrsq.calibration.text import load_documents
from rrsq.calibration.windows import evaluation_windows
from rrsq.cli.app import app
from rrsq.evaluation.perplexity import perplexity

OPTIONS = ("--device", "cpu", "--dtype", "float32", "--sequence-length", "64", "--limit", "4")


def rrsq_eval(*arguments: object) -> Any:
    environment = {"COLUMNS": "200", "RRSQ_DATA_ROOT": None, "RRSQ_DEBUG": None}
    return CliRunner().invoke(app, ["eval", *map(str, arguments), *OPTIONS], env=environment)


def expected_perplexity(folder: Path, documents: list[str]) -> float:
    windows = evaluation_windows(AutoTokenizer.from_pretrained(folder), documents, 64, 4)
    return perplexity(AutoModelForCausalLM.from_pretrained(folder), windows).perplexity


def test_model_and_baseline_on_two_texts(
    tiny_llama_dir: Path, tiny_qwen2_dir: Path, tiny_hub: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    file = tmp_path / "result.json"
    tasks = f"wikitext2,text:{tiny_text_file}"
    done = rrsq_eval(
        tiny_llama_dir,
        "--baseline",
        tiny_qwen2_dir,
        "--tasks",
        tasks,
        "--data-root",
        tiny_hub,
        "--json",
        file,
    )
    assert done.exit_code == 0, done.output
    document = json.loads(file.read_text())
    texts = {
        "wikitext2": load_documents("wikitext2", split="test", data_root=tiny_hub),
        f"text:{tiny_text_file}": [tiny_text_file.read_text(encoding="utf-8")],
    }
    for index, (task, documents) in enumerate(texts.items()):
        values = []
        for role, folder in (("model", tiny_llama_dir), ("baseline", tiny_qwen2_dir)):
            result = document[role]["results"][index]
            assert result["task"] == task
            assert result["num_windows"] == 4
            assert result["value"] == pytest.approx(expected_perplexity(folder, documents), rel=1e-6)
            values.append(result["value"])
            assert f"{result['value']:.4f}" in done.stdout
        comparison = document["comparison"][task]
        assert comparison == {"ratio": pytest.approx(values[0] / values[1]), "same_data": True}
    assert document["model"]["path"] == str(tiny_llama_dir)
    assert (document["model"]["device"], document["model"]["dtype"]) == ("cpu", "float32")
    assert {"rrsq", "torch", "transformers"} <= set(document["versions"])
    assert "first token of a window is not predicted" in done.stderr


def test_without_a_baseline_there_is_no_ratio(tiny_llama_dir: Path, tiny_text_file: Path) -> None:
    done = rrsq_eval(tiny_llama_dir, "--tasks", f"text:{tiny_text_file}")
    assert done.exit_code == 0, done.output
    assert "perplexity" in done.stdout
    assert "ratio" not in done.stdout


def test_broken_model_is_said_to_be_broken(
    tiny_qwen2_dir: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2_dir)
    model.lm_head.weight.data[0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(tiny_qwen2_dir).save_pretrained(tmp_path / "broken")
    done = rrsq_eval(tmp_path / "broken", "--tasks", f"text:{tiny_text_file}", "--json", tmp_path / "r.json")
    assert done.exit_code == 0, done.output
    assert "gave nan" in done.stderr
    assert json.loads((tmp_path / "r.json").read_text())["model"]["results"][0]["value"] == "NaN"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "wikitxt2"], "Did you mean 'wikitext2'"),
        (["--tasks", "text:no-such.txt"], "no text file 'no-such.txt'"),
        (["--tasks", "wikitext2"], "--data-root or RRSQ_DATA_ROOT"),
        (["--json", "no/such/folder/result.json"], "no folder"),
        (["--data-root", "no-such-folder"], "not a folder"),
    ],
)
def test_wrong_requests_fail_before_a_model_is_loaded(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    done = rrsq_eval("no-such-model", *arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_missing_model_is_one_message(tiny_text_file: Path) -> None:
    done = rrsq_eval("no-such-model", "--tasks", f"text:{tiny_text_file}")
    assert done.exit_code == 2, done.output
    assert "no-such-model" in done.stderr
    assert "Traceback" not in done.stderr
