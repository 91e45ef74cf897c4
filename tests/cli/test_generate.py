"""``rrsq generate``: the text of the model, as it comes, with and without a chat template."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from rrsq.cli.app import app
from tiny_vllm import StandIn

TEMPLATE = (
    "{% for message in messages %}the {{ message['content'] }} was{% endfor %}"
    "{% if add_generation_prompt %} and{% endif %}"
)


def rrsq_generate(*arguments: object) -> Result:
    return CliRunner().invoke(
        app, ["generate", *map(str, arguments), "--device", "cpu"], env={"COLUMNS": "200"}
    )


def greedy(folder: Path, prompt: str, count: int) -> str:
    """What the model adds to a prompt."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        for _ in range(count):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


@pytest.fixture
def chatting(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """The tiny Llama with a chat template."""
    shutil.copytree(tiny_llama_dir, tmp_path / "chatting")
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_llama_dir)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "chatting")
    return tmp_path / "chatting"


def test_the_likeliest_text(tiny_llama_dir: Path) -> None:
    result = rrsq_generate(tiny_llama_dir, "the river", "--max-new-tokens", 6)
    assert result.exit_code == 0, result.output
    assert result.stdout.rstrip("\n") == greedy(tiny_llama_dir, "the river", 6).rstrip("\n")


def test_chat_wraps_the_prompt_and_shows_the_answer_only(chatting: Path) -> None:
    result = rrsq_generate(chatting, "king", "--chat", "--max-new-tokens", 6)
    assert result.exit_code == 0, result.output
    whole = greedy(chatting, "the king was and", 6)
    assert result.stdout.strip() == whole.removeprefix("the king was and").strip()


def test_chat_needs_a_template(tiny_llama_dir: Path) -> None:
    result = rrsq_generate(tiny_llama_dir, "king", "--chat")
    assert result.exit_code == 2
    assert "has no chat template" in result.stderr
    assert "Leave out --chat" in result.stderr


def test_a_seed_makes_sampling_repeatable(tiny_llama_dir: Path) -> None:
    first, again, other = (
        rrsq_generate(
            tiny_llama_dir, "the", "--temperature", 2.0, "--seed", seed, "--max-new-tokens", 12
        ).stdout
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_the_same_text_through_vllm(chatting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for vLLM that runs transformers' models: prompt, template and what is shown."""
    with StandIn.installed(monkeypatch) as vllm:
        for words in (("the river",), ("king", "--chat")):
            expected = rrsq_generate(chatting, *words, "--max-new-tokens", 6)
            command = ["generate", str(chatting), *words, "--max-new-tokens", "6", "--engine", "vllm"]
            result = CliRunner().invoke(app, [*command, "--seed", "3"], env={"COLUMNS": "200"})
            assert result.exit_code == 0, result.output
            assert result.stdout.strip() == expected.stdout.strip()
    for engine in vllm.engines:
        ((prompts, sampling),) = engine.asked
        assert (sampling.max_tokens, sampling.temperature, sampling.seed) == (6, 0.0, 3)
        assert not sampling.ignore_eos
        assert engine.options["max_model_len"] == len(prompts[0]) + 6
        assert engine.closed


def test_what_vllm_cannot_do_is_refused(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*words: object) -> Result:
        return CliRunner().invoke(app, ["generate", str(tiny_llama_dir), "the", *map(str, words)])

    missing = run("--engine", "vllm")
    assert missing.exit_code == 2
    assert "pip install 'rrsq[vllm]'" in missing.stderr
    with StandIn.installed(monkeypatch) as vllm:
        for words, message in (
            (("--engine", "vllm", "--device", "cpu"), "--device has no effect"),
            (("--engine", "vllm", "--max-new-tokens", 10**6), "exceed the model's context"),
            (("--engine", "vllm", "--engine-options", "{"), "no valid JSON"),
            (("--engine-options", "{}"), "--engine-options needs --engine vllm"),
        ):
            result = run(*words)
            assert result.exit_code == 2, result.output
            assert message in result.stderr.replace("\n", " ")
        assert not vllm.engines
