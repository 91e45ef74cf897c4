"""The needle test: what is asked, how an answer is judged, and the task around it."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

import rrsq
from rrsq.cli.app import app
from rrsq.errors import DataError, UsageError
from rrsq.evaluation import needle
from rrsq.evaluation.needle import NEEDLES, Answer, Haystack, Question, ask, questions
from rrsq.evaluation.results import TaskResult
from rrsq.evaluation.tasks import TaskOptions, parse_tasks
from rrsq.quantizer.calibration.windows import BosChoice
from tiny_families import tiny_model
from tiny_models import make_text

SENTENCE = re.compile(r"\nThe secret number of (\w+) is (\d{7})\.\n")
TEXT = make_text(500, seed=7)


@pytest.mark.parametrize("depth", [0, 25, 50, 100])
@pytest.mark.parametrize("length", [300, 777])
def test_a_question_is_a_text_with_needles(
    tiny_tokenizer: PreTrainedTokenizerFast, length: int, depth: int
) -> None:
    question = Haystack(tiny_tokenizer, TEXT, "text").question(length, depth, "seed")
    assert len(question.prompt) + len(question.answer) == length
    prompt, answer = tiny_tokenizer.decode(question.prompt), tiny_tokenizer.decode(question.answer)
    numbers = dict(SENTENCE.findall(prompt))
    assert len(numbers) == len(set(numbers.values())) == NEEDLES
    hay, city = prompt.rsplit("\n\nThe secret number of ", 1)
    city = city.removesuffix(" is")
    assert answer == f" {numbers[city]}"
    assert SENTENCE.sub("", hay) in TEXT
    # Where it stands, other needles left out: at the end of a sentence, less than 64 tokens before its place.
    before, after = re.split(rf"\nThe secret number of {city} is \d+\.\n", hay)
    before, after = SENTENCE.sub("", before), SENTENCE.sub("", after)
    assert not before or before.rstrip(" ").endswith((".", "\n"))
    tokens = [len(tiny_tokenizer(part)["input_ids"]) for part in (before, after)]
    place = sum(tokens) * depth / 100
    assert place - 64 <= tokens[0] <= place + 2


def test_the_same_seed_asks_the_same(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    def prompts(count: int, length: int = 400) -> list[list[int]]:
        haystack = Haystack(tiny_tokenizer, TEXT, "text")
        return [each.prompt.tolist() for each in questions(haystack, length, (0, 50), count)]

    assert prompts(5)[:3] == prompts(3)
    assert len({tuple(prompt) for prompt in prompts(5)}) == 5
    haystack = Haystack(tiny_tokenizer, TEXT, "text")
    assert [each.depth for each in questions(haystack, 400, (0, 50), 5)] == [0, 50, 0, 50, 0]
    # Another length is another place in the text, and another city.
    assert prompts(1)[0][:20] != prompts(1, 401)[0][:20]


def test_the_longest_text_and_one_that_is_too_short(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    haystack = Haystack(tiny_tokenizer, TEXT, "notes.txt")
    available = len(tiny_tokenizer(TEXT)["input_ids"])
    around = 300 - len(tiny_tokenizer(SENTENCE.sub("", _hay(haystack, 300)))["input_ids"])
    with pytest.raises(DataError, match=rf"'notes.txt' has {available} tokens, too few for --context"):
        haystack.question(available + around + 50, 0, "s")
    with pytest.raises(UsageError, match=r"--context 40: .* take \d\d\d tokens"):
        haystack.question(40, 0, "s")


def _hay(haystack: Haystack, length: int) -> str:
    decoded: Any = haystack._tokenizer.decode(haystack.question(length, 50, "s").prompt)
    return str(decoded).rsplit("\n\nThe secret", 1)[0]


@pytest.mark.parametrize("quantized", [False, True])
def test_an_answer_is_right_if_generate_gives_it(
    quantized: bool, tiny_qwen2_dir: Path, qwen2_checkpoint: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = qwen2_checkpoint if quantized else tiny_qwen2_dir
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    asked = Haystack(tiny_tokenizer, TEXT, "text").question(300, 50, "seed")
    new = model.generate(
        asked.prompt[None],
        attention_mask=torch.ones_like(asked.prompt[None]),
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
    )[0, len(asked.prompt) :]
    assert ask(model, replace(asked, answer=new)).correct
    for place in (0, 5):
        wrong = new.clone()
        wrong[place] = (wrong[place] + 1) % 400
        assert not ask(model, replace(asked, answer=wrong)).correct
    # The probability is that of a forward pass over all at once, whose keys and values are the cache's.
    whole = torch.cat([asked.prompt, asked.answer])
    with torch.no_grad():
        logits = model(whole[None], use_cache=False).logits[0].double()
    logprobs = logits.log_softmax(-1)[len(asked.prompt) - 1 : -1].gather(1, asked.answer[:, None])
    found = ask(model, asked)
    assert found.depth == 50
    assert found.logprob == pytest.approx(logprobs.sum().item(), rel=1e-3 if quantized else 1e-5)


def test_tokens_that_the_model_does_not_know(tiny_qwen2_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2_dir)
    question = Question(0, torch.tensor([1, 2]), torch.tensor([600]))
    with pytest.raises(UsageError, match="512 tokens"):
        ask(model, question)


def run(
    folder: Path, text: Path, options: TaskOptions, monkeypatch: pytest.MonkeyPatch | None = None
) -> list[TaskResult]:
    (task,) = parse_tasks(f"needle:{text}")
    task.prepare(options)
    model = AutoModelForCausalLM.from_pretrained(folder)
    (results,) = task.run(model, AutoTokenizer.from_pretrained(folder), options).values()
    return list(results)


def test_numbers_are_those_of_the_answers(
    tiny_llama_dir: Path, tiny_text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Question] = []

    def answer(model: object, question: Question) -> Answer:
        asked.append(question)
        return Answer(question.depth, question.depth < 60, -float(len(asked)))

    monkeypatch.setattr(needle, "ask", answer)
    said: list[tuple[int, int, str]] = []
    options = TaskOptions(
        context=(400, 500, 400), depths=(20, 70), on_progress=lambda *call: said.append(call), limit=3
    )
    first, second = run(tiny_llama_dir, tiny_text_file, options)
    assert [len(each.prompt) + len(each.answer) for each in asked] == [400] * 3 + [500] * 3
    assert first.task == f"needle:{tiny_text_file}@400"
    assert second.task == f"needle:{tiny_text_file}@500"
    exact, logprob = second.metrics
    assert (exact.name, logprob.name) == ("exact_match", "answer_logprob")
    assert exact.value == pytest.approx(2 / 3)
    assert exact.stderr == pytest.approx(math.sqrt(2 / 3 * 1 / 3 / 3))
    assert logprob.value == -5.0
    assert logprob.stderr == pytest.approx(1 / math.sqrt(3))
    assert logprob.recovery(-4.0) is None
    assert [(one["depth"], one["questions"], one["exact_match"]) for one in second.details["by_depth"]] == [
        (20, 2, 1.0),
        (70, 1, 0.0),
    ]
    assert [one["logprob"] for one in second.details["answers"]] == [-4.0, -5.0, -6.0]
    assert first.data_fingerprint != second.data_fingerprint
    assert said[-1] == (6, 6, "4 of 6 found")
    assert TaskResult.from_dict(json.loads(json.dumps(second.to_dict()))) == second
    asked.clear()
    run(tiny_llama_dir, tiny_text_file, replace(options, context=(400,), limit=None))
    assert len(asked) == 20


def test_results_depend_on_lengths_and_depths(tiny_text_file: Path) -> None:
    (task,) = parse_tasks(f"needle:{tiny_text_file}")
    keys = set()
    for options in (TaskOptions(), TaskOptions(context=(2048,)), TaskOptions(depths=(0, 50))):
        task.prepare(options)
        keys.add(task.data_keys()[task.names[0]])
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("model_type", "bos", "begins"),
    [("gemma3_text", "auto", True), ("gemma3_text", "never", False), ("llama", "auto", False)],
)
def test_prompts_begin_with_bos_where_the_family_needs_it(
    model_type: str,
    bos: BosChoice,
    begins: bool,
    tiny_llama_dir: Path,
    tiny_text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Question] = []
    monkeypatch.setattr(needle, "ask", lambda model, question: asked.append(question) or Answer(0, True, 0.0))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    options = TaskOptions(context=(250,), depths=(50,), limit=1, bos=bos)
    (task,) = parse_tasks(f"needle:{tiny_text_file}")
    task.prepare(options)
    task.run(tiny_model(model_type), tokenizer, options)
    assert (asked[0].prompt[0] == tokenizer.bos_token_id) == begins
    assert len(asked[0].prompt) + len(asked[0].answer) == 250


def rrsq_eval(*words: object) -> Any:
    environment = {"RRSQ_DATA_ROOT": None, "COLUMNS": "200"}
    return CliRunner().invoke(app, ["eval", *map(str, words)], env=environment)


def test_two_models_on_the_command_line(
    tiny_qwen2_dir: Path, qwen2_checkpoint: Path, tiny_hub: Path, tmp_path: Path
) -> None:
    file = tmp_path / "result.json"
    words = (tiny_qwen2_dir, qwen2_checkpoint, "--tasks", "needle", "--context", "300,400", "--limit", 2)
    done = rrsq_eval(*words, "--device", "cpu", "--data-root", tiny_hub, "--json", file)
    assert done.exit_code == 0, done.output
    document = json.loads(file.read_text())
    for model in document["models"]:
        assert [result["task"] for result in model["results"]] == ["needle@300", "needle@400"]
    fingerprints = [[each["data_fingerprint"] for each in m["results"]] for m in document["models"]]
    assert fingerprints[0] == fingerprints[1]
    compared = [one for one in document["comparison"] if one["metric"] == "answer_logprob"]
    assert [one["recovery"] for one in compared] == [None, None]
    assert all(abs(one["difference"]) > 1e-4 for one in compared)
    assert "needle@400" in done.stdout
    assert "The secret number of CITY" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--context", "4096"), "--context 4096 exceeds the model's context of 2048: give --context 2048 or"),
        (("--context", "300,4096"), "--context 4096 exceeds the model's context"),
        (("--context", "64"), "--context 64: the sentences to be found and the question take"),
        (("--context", "0"), "--context 0: expected positive numbers, for example 2048,8192"),
        (("--context", "8k"), "--context 8k: expected positive numbers"),
        (("--depths", "0,101"), "--depths 0,101: expected numbers from 0 to 100, for example 0,50,100"),
        (("--depths", ""), "--depths : expected numbers"),
    ],
)
def test_what_cannot_be_asked(
    words: tuple[str, str], message: str, tiny_llama_dir: Path, tiny_text_file: Path
) -> None:
    result = rrsq_eval(tiny_llama_dir, "--tasks", f"needle:{tiny_text_file}", *words, "--device", "cpu")
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_text_that_is_too_short(tiny_llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("A short text.")
    result = rrsq_eval(tiny_llama_dir, "--tasks", f"needle:{tmp_path / 'short.txt'}", "--context", "512")
    assert result.exit_code == 2
    assert "tokens, too few for --context 512" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": []}, "context is empty"),
        ({"context": [512, 0]}, "context is 0, and must be at least 1"),
        ({"context": "2048"}, "context is '2048', and must be an integer"),
        ({"depths": 101}, "depths is more than 100"),
    ],
)
def test_arguments_of_the_function(arguments: dict[str, Any], message: str, tiny_llama_dir: Path) -> None:
    with pytest.raises(UsageError, match=message):
        rrsq.evaluate(tiny_llama_dir, "needle", **arguments)
