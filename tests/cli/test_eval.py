"""``rrsq eval`` on tiny models, in this process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from rrsq.cli.app import app
from rrsq.evaluation.perplexity import perplexity
from rrsq.quantizer.calibration.text import load_documents
from rrsq.quantizer.calibration.windows import evaluation_windows

OPTIONS = ("--device", "cpu", "--dtype", "float32", "--sequence-length", "64", "--limit", "4")


def rrsq_eval(*arguments: object) -> Any:
    environment = {"COLUMNS": "200", "RRSQ_DATA_ROOT": None, "RRSQ_DEBUG": None}
    return CliRunner().invoke(app, ["eval", *map(str, arguments), *OPTIONS], env=environment)


def expected_perplexity(folder: Path, documents: list[str]) -> float:
    windows = evaluation_windows(AutoTokenizer.from_pretrained(folder), documents, 64, 4)
    return perplexity(AutoModelForCausalLM.from_pretrained(folder), windows).perplexity


def test_three_models_on_two_texts(
    tiny_llama_dir: Path, tiny_qwen2_dir: Path, tiny_hub: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_llama_dir, copy)
    folders = [tiny_llama_dir, tiny_qwen2_dir, copy]
    file = tmp_path / "result.json"
    tasks = f"wikitext2,text:{tiny_text_file}"
    done = rrsq_eval(*folders, "--tasks", tasks, "--data-root", tiny_hub, "--json", file)
    assert done.exit_code == 0, done.output
    document = json.loads(file.read_text())
    texts = {
        "wikitext2": load_documents("wikitext2", split="test", data_root=tiny_hub),
        f"text:{tiny_text_file}": [tiny_text_file.read_text(encoding="utf-8")],
    }
    comparison = {(one["task"], one["model"]): one for one in document["comparison"]}
    for index, (task, documents) in enumerate(texts.items()):
        expected = [expected_perplexity(folder, documents) for folder in folders]
        for folder, model, value in zip(folders, document["models"], expected, strict=True):
            result = model["results"][index]
            assert model["path"] == str(folder)
            assert (result["task"], result["details"]["num_windows"]) == (task, 4)
            assert result["metrics"][0]["value"] == pytest.approx(value, rel=1e-6)
            assert f"{result['metrics'][0]['value']:.4f}" in done.stdout
        other = comparison[task, str(tiny_qwen2_dir)]
        assert other["difference"] == pytest.approx(expected[1] - expected[0])
        assert other["recovery"] == pytest.approx(expected[1] / expected[0])
        assert f"×{other['recovery']:.3f}" in done.stdout
        assert comparison[task, str(copy)]["recovery"] == 1.0
    assert document["reference"] == str(tiny_llama_dir)
    assert (document["models"][0]["device"], document["models"][0]["dtype"]) == ("cpu", "float32")
    assert {"rrsq", "torch", "transformers"} <= set(document["versions"])
    assert "first token of a window is not predicted" in done.stderr
    assert "recovery:" in done.stderr


def test_baseline_is_the_reference(tiny_llama_dir: Path, tiny_qwen2_dir: Path, tiny_text_file: Path) -> None:
    task = ("--tasks", f"text:{tiny_text_file},kl:{tiny_text_file}")
    named = rrsq_eval(tiny_qwen2_dir, "--baseline", tiny_llama_dir, *task)
    in_order = rrsq_eval(tiny_llama_dir, tiny_qwen2_dir, *task)
    assert named.exit_code == in_order.exit_code == 0, named.output
    assert named.stdout == in_order.stdout
    assert "kl_mean" in named.stdout


def test_a_single_model_is_not_compared(tiny_llama_dir: Path, tiny_text_file: Path) -> None:
    done = rrsq_eval(tiny_llama_dir, "--tasks", f"text:{tiny_text_file}")
    assert done.exit_code == 0, done.output
    assert "perplexity" in done.stdout
    assert "recovery" not in done.output


def test_accuracy_has_its_error_and_an_average(
    tiny_llama_dir: Path, tiny_qwen2_dir: Path, tiny_task_hub: Path, tmp_path: Path
) -> None:
    file = tmp_path / "result.json"
    tasks = ("--tasks", "arc_e,boolq", "--data-root", tiny_task_hub)
    done = rrsq_eval(tiny_llama_dir, tiny_qwen2_dir, *tasks, "--json", file)
    assert done.exit_code == 0, done.output
    document = json.loads(file.read_text())
    results = {result["task"]: result["metrics"] for result in document["models"][1]["results"]}
    easy, boolq = results["arc_e"][0], results["boolq"][0]
    assert easy["name"] == "acc_norm"
    assert f"{easy['value']:.4f} ±{easy['stderr']:.4f}" in done.stdout
    assert results["average"][0]["value"] == pytest.approx((easy["value"] + boolq["value"]) / 2)
    assert "lm-eval" in done.stderr
    assert "the first 4 questions" in done.stderr


def test_lm_eval_and_datasets_are_silent(tiny_llama_dir: Path, tiny_task_hub: Path) -> None:
    command = [sys.executable, "-m", "rrsq.cli", "eval", tiny_llama_dir, "--tasks", "arc_e", *OPTIONS]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "RRSQ_DATA_ROOT": str(tiny_task_hub),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "acc_norm" in done.stdout
    first, *said = done.stderr.splitlines()
    assert first.startswith("finding tasks and their data, ")
    assert any(line.startswith("✓ tiny-llama: arc_e") for line in said)
    notes = (f"tiny-llama: {tiny_llama_dir}", "arc_e: lm-eval")
    assert all(line.startswith(("✓ tiny-llama: arc_e", " ", *notes)) for line in said), done.stderr


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
    assert (
        json.loads((tmp_path / "r.json").read_text())["models"][0]["results"][0]["metrics"][0]["value"]
        == "NaN"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "tex:notes.txt"], "Did you mean 'text'"),
        (["--tasks", "boolq"], "needs the data set aps/super_glue"),
        (["--batch-size", "many"], "expected a positive number or auto"),
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


def test_other_tokenizers_and_missing_references_are_refused_before_a_model_is_loaded(
    tiny_llama_dir: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    task = f"text:{tiny_text_file}"
    other = tmp_path / "other"
    shutil.copytree(tiny_llama_dir, other, ignore=shutil.ignore_patterns("*.safetensors"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    for arguments, message in (
        (
            (tiny_llama_dir, other, "--tasks", task),
            "have different tokenizers (the same text gives other tokens)",
        ),
        ((tiny_llama_dir, "--tasks", f"kl:{tiny_text_file}"), "Name the full-precision model first"),
        ((tiny_llama_dir, tiny_llama_dir, "--tasks", task), "named twice"),
    ):
        done = rrsq_eval(*arguments)
        assert done.exit_code == 2, done.output
        assert message in done.stderr
        assert done.stdout == ""


def test_missing_model_is_one_message(tiny_text_file: Path) -> None:
    done = rrsq_eval("no-such-model", "--tasks", f"text:{tiny_text_file}")
    assert done.exit_code == 2, done.output
    assert "no-such-model" in done.stderr
    assert "Traceback" not in done.stderr
