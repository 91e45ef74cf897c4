"""``rrsq eval --engine vllm``: the numbers of transformers, by an engine that stands in for vLLM."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from transformers import AutoTokenizer
from typer.testing import CliRunner

from rrsq.cli.app import app
from rrsq.evaluation import served
from rrsq.evaluation.needle import Haystack, questions
from rrsq.evaluation.perplexity import perplexity_by
from rrsq.vllm.engine import Engine
from tiny_vllm import StandIn, lm_eval_model

SMALL = ("--sequence-length", 48, "--limit", 3, "--dtype", "float32")


def rrsq_eval(*words: object) -> Result:
    environment = {"RRSQ_DATA_ROOT": None, "COLUMNS": "200"}
    return CliRunner().invoke(app, ["eval", *map(str, words)], env=environment)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with StandIn.installed(monkeypatch) as stand_in:
        yield stand_in


def measured(result: Result, path: Path) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(path.read_text())


def test_perplexity_is_that_of_transformers(
    vllm: StandIn, tiny_qwen2_dir: Path, qwen2_checkpoint: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "result.json"
    words = (tiny_qwen2_dir, qwen2_checkpoint, "--tasks", f"text:{tiny_text_file}", *SMALL, "--json", path)
    expected = measured(rrsq_eval(*words, "--device", "cpu"), path)
    found = measured(rrsq_eval(*words, "--engine", "vllm"), path)
    for theirs, ours in zip(expected["models"], found["models"], strict=True):
        (here,), (there,) = ours["results"], theirs["results"]
        assert here["metrics"][0]["value"] == pytest.approx(there["metrics"][0]["value"], rel=1e-5)
        for key in ("convention", "data_fingerprint", "task"):
            assert here[key] == there[key]
        assert here["details"]["num_tokens"] == there["details"]["num_tokens"] == 3 * 47
        assert (ours["dtype"], ours["quantization"]) == (theirs["dtype"], theirs["quantization"])
        assert ours["device"] == "vLLM on no GPU"
    assert found["comparison"][0]["recovery"] == pytest.approx(
        expected["comparison"][0]["recovery"], rel=1e-5
    )
    first, second = vllm.engines
    assert first.closed
    assert second.closed
    for engine in (first, second):
        assert engine.options["max_model_len"] == 49
        assert {sampling.prompt_logprobs for _, sampling in engine.asked} == {0}


def test_two_texts_share_an_engine(
    vllm: StandIn, tiny_llama_dir: Path, tiny_text_file: Path, tiny_hub: Path
) -> None:
    tasks = f"text:{tiny_text_file},wikitext2"
    words = ("--tasks", tasks, *SMALL, "--data-root", tiny_hub, "--engine", "vllm")
    options = '{"gpu_memory_utilization": 0.25, "seed": 5}'
    assert rrsq_eval(tiny_llama_dir, *words, "-t", 2, "--engine-options", options).exit_code == 0
    (engine,) = vllm.engines
    assert (engine.options["seed"], engine.options["gpu_memory_utilization"]) == (5, 0.25)
    assert engine.options["tensor_parallel_size"] == 2


def test_tasks_of_lm_eval(
    vllm: StandIn,
    qwen2_checkpoint: Path,
    tiny_task_hub: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(served, "_lm_eval_model", lm_eval_model)
    path = tmp_path / "result.json"
    words = (
        qwen2_checkpoint,
        "--tasks",
        "wikitext2,arc_e",
        *SMALL,
        "--data-root",
        tiny_task_hub,
        "--json",
        path,
    )
    expected = measured(rrsq_eval(*words, "--device", "cpu"), path)
    found = measured(rrsq_eval(*words, "--engine", "vllm"), path)
    pairs = zip(expected["models"][0]["results"], found["models"][0]["results"], strict=True)
    for theirs, ours in pairs:
        values = [[metric["value"] for metric in each["metrics"]] for each in (theirs, ours)]
        assert values[1] == pytest.approx(values[0], rel=1e-5)
        assert ours["data_fingerprint"] == theirs["data_fingerprint"]
    assert [engine.closed for engine in vllm.engines] == [True, True]


def test_needles_are_those_of_transformers(
    vllm: StandIn, tiny_qwen2_dir: Path, qwen2_checkpoint: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "result.json"
    task = ("--tasks", f"needle:{tiny_text_file}", "--context", "300,400", *SMALL, "--json", path)
    expected = measured(rrsq_eval(tiny_qwen2_dir, qwen2_checkpoint, *task, "--device", "cpu"), path)
    found = measured(rrsq_eval(tiny_qwen2_dir, qwen2_checkpoint, *task, "--engine", "vllm"), path)
    for theirs, ours in zip(expected["models"], found["models"], strict=True):
        for there, here in zip(theirs["results"], ours["results"], strict=True):
            assert here["data_fingerprint"] == there["data_fingerprint"]
            values = [[metric["value"] for metric in each["metrics"]] for each in (there, here)]
            assert values[1] == pytest.approx(values[0], rel=1e-3)
    for engine in vllm.engines:  # One engine for all lengths, and as many new tokens as a number has.
        assert engine.options["max_model_len"] == 401
        assert [sampling.prompt_logprobs for _, sampling in engine.asked] == [None, 0, None, 0]


def test_an_answer_is_right_if_it_begins_with_the_number(
    vllm: StandIn, tiny_qwen2_dir: Path, tiny_text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen2_dir)
    haystack = Haystack(tokenizer, tiny_text_file.read_text(encoding="utf-8"), "text")
    asked = questions(haystack, 300, (50,), 3)
    first, second, third = (question.answer.tolist() for question in asked)
    made = [[*first, 9], [*second[:-1], second[-1] + 1], third]
    monkeypatch.setattr(Engine, "complete", lambda engine, prompts, max_tokens: made)
    path = tmp_path / "result.json"
    task = ("--tasks", f"needle:{tiny_text_file}", "--context", 300, "--depths", 50, "--limit", 3)
    document = measured(rrsq_eval(tiny_qwen2_dir, *task, "--engine", "vllm", "--json", path), path)
    (result,) = document["models"][0]["results"]
    assert [answer["correct"] for answer in result["details"]["answers"]] == [True, False, True]
    assert result["metrics"][0]["value"] == pytest.approx(2 / 3)


def test_a_window_as_long_as_the_context(vllm: StandIn, tiny_llama_dir: Path, tiny_text_file: Path) -> None:
    """vLLM wants room for the token after it, which is never run."""
    context = json.loads((tiny_llama_dir / "config.json").read_text())["max_position_embeddings"]
    words = (tiny_llama_dir, "--tasks", f"text:{tiny_text_file}", "--limit", 1, "--engine", "vllm")
    assert rrsq_eval(*words, "--sequence-length", context).exit_code == 0
    assert vllm.engines[-1].options["max_model_len"] == context + 1
    assert served.os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] == "1"
    result = rrsq_eval(*words, "--sequence-length", context + 1)
    assert result.exit_code == 2
    assert f"exceed the model's context of {context}" in result.stderr


def test_what_vllm_cannot_do_is_refused_before_it_starts(
    vllm: StandIn,
    tiny_llama_dir: Path,
    fully_rotated_checkpoint: Path,
    tiny_text_file: Path,
    tmp_path: Path,
) -> None:
    task = ("--tasks", f"text:{tiny_text_file}")
    gguf = tmp_path / "x.gguf"
    gguf.write_bytes(b"GGUF")
    for words, message in (
        ((tiny_llama_dir, tiny_llama_dir, "--tasks", "kl"), "cannot measure kl: it compares probabilities"),
        ((fully_rotated_checkpoint, *task, "-t", 2), "rotation.shards=2"),
        ((gguf, *task), "is a GGUF file"),
        ((tmp_path / "none", *task), "There is no model folder"),
        ((tiny_llama_dir, *task, "--device", "cpu"), "--device has no effect with --engine vllm"),
        ((tiny_llama_dir, *task, "--batch-size", 4), "--batch-size has no effect with --engine vllm"),
        ((tiny_llama_dir, *task, "-t", 9), "vLLM needs 9 NVIDIA GPUs; torch sees 8"),
    ):
        result = rrsq_eval(*words, "--engine", "vllm")
        assert result.exit_code == 2, result.output
        assert message in result.stderr
    assert not vllm.engines


def test_without_vllm_it_says_how_to_install_it(tiny_llama_dir: Path) -> None:
    result = rrsq_eval(tiny_llama_dir, "--engine", "vllm")
    assert result.exit_code == 2
    assert "pip install 'rrsq[vllm]'" in result.stderr
    result = rrsq_eval(tiny_llama_dir, "-t", 2)
    assert "--tensor-parallel-size needs --engine vllm" in result.stderr


def test_an_engine_that_does_not_start_or_stops(
    vllm: StandIn, tiny_llama_dir: Path, tiny_text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (tiny_llama_dir, "--tasks", f"text:{tiny_text_file}", *SMALL, "--engine", "vllm")
    short = rrsq_eval(*words, "--engine-options", '{"max_model_len": 7}')
    assert short.exit_code == 1
    assert "vLLM stopped: ValueError: a request of 49 tokens is too long" in short.stderr
    assert vllm.engines[-1].closed
    vllm.fails_on = "LlamaForCausalLM"
    result = rrsq_eval(*words)
    assert result.exit_code == 1
    assert (
        f"vLLM did not start with '{tiny_llama_dir}': RuntimeError: no LlamaForCausalLM here" in result.stderr
    )


def test_tokens_that_the_model_does_not_know(
    vllm: StandIn, tiny_llama_dir: Path, tiny_text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "vocabulary", 5)
    result = rrsq_eval(tiny_llama_dir, "--tasks", f"text:{tiny_text_file}", *SMALL, "--engine", "vllm")
    assert result.exit_code == 2
    assert "the model knows 5 tokens" in result.stderr


def test_the_mean_is_over_all_predicted_tokens() -> None:
    windows = torch.arange(15).view(5, 3)
    told: list[tuple[int, int, float]] = []

    def score(batch: list[list[int]]) -> list[list[float]]:
        return [[-float(token) / 10 for token in window[1:]] for window in batch]

    result = perplexity_by(score, windows, batch_size=2, on_progress=lambda *step: told.append(step))
    assert result.mean_nll == pytest.approx(windows[:, 1:].double().mean().item() / 10)
    assert [step[:2] for step in told] == [(2, 5), (4, 5), (5, 5)]
    assert told[-1][2] == result.perplexity
    with pytest.raises(ValueError, match="log-probabilities"):
        perplexity_by(lambda batch: [[0.0] for _ in batch], windows)
