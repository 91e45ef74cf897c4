"""Options of the commands that measure, run, make and send models, with and without an engine: one clear
error each.

vLLM and GPUs seem to be there, so that a wrong option is not hidden by their absence; nothing may be started.
"""

from __future__ import annotations

import functools
import json
import random
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from typer.main import get_command

from rrsq.benchmarking.whole import process
from rrsq.benchmarking.whole.process import Outcome
from rrsq.cli.app import app
from tiny_vllm import StandIn

SECONDS = 30.0
NUMBERS = ["0", "-1", "1.5", "", "1e9", "9" * 30, "\x1b[2J"]
WHOLE = ("bench", "--whole")
# A command, and what of the following stands behind it: OUT is a checkpoint, FULL a model that is none.
MAKE = ("quantize", "calibrate", "compare")
COMMANDS = {
    "bench": ("bench", "--whole", "--model", "OUT", "--engine", "vllm"),
    "bench-transformers": ("bench", "--whole", "--model", "OUT", "--device", "cpu"),
    "eval": ("eval", "OUT", "--engine", "vllm", "--tasks", "text:TEXT"),
    "generate": ("generate", "OUT", "the", "--engine", "vllm"),
    "serve": ("serve", "OUT"),
    "eval-transformers": ("eval", "OUT", "--tasks", "text:TEXT"),
    "generate-transformers": ("generate", "OUT", "the"),
    "quantize": ("quantize", "FULL", "-o", "made", "--calibration-data", "TEXT"),
    "calibrate": ("calibrate", "FULL", "-o", "made", "--calibration-data", "TEXT"),
    "compare": ("compare", "FULL", "--recipes", "rtn-w4a4", "--tasks", "text:TEXT", "-o", "made"),
    "push": ("push", "OUT"),
    "export": ("export", "OUT", "-o", "made"),
}
OPTIONS = {
    "bench": ("--batch", "--context", "--loads", "--new-tokens", "--repeats", "-t"),
    "bench-transformers": ("--batch", "--context", "--loads", "--new-tokens", "--repeats"),
    "eval": ("-t", "--sequence-length"),
    "generate": ("-t", "--max-new-tokens"),
    "serve": ("-t",),
    "eval-transformers": ("--limit", "--sequence-length", "--batch-size"),
    "generate-transformers": ("--max-new-tokens",),
    "quantize": ("--num-samples", "--sequence-length", "--target-bits", "--target-activation-bits"),
    "calibrate": ("--num-samples", "--sequence-length"),
    "compare": ("--limit", "--sequence-length", "--num-samples", "--calibration-length"),
}


def wrong_numbers() -> Iterator[tuple[str, ...]]:
    """Each number option with each number that is none, or is absurd."""
    for name, options in OPTIONS.items():
        for option in options:
            yield from ((*COMMANDS[name], option, number) for number in NUMBERS)


def wrong_lists() -> Iterator[tuple[str, ...]]:
    """Lists that are none."""
    for text in (",", "1,", "1,,2", "1;2", "1,-2", "0,1", "1,x", "1," + "9" * 20):
        for option in ("--batch", "--context"):
            yield (*COMMANDS["bench-transformers"], option, text)
        yield (*COMMANDS["eval-transformers"], "--context", text)
        yield (*COMMANDS["eval-transformers"], "--depths", text.replace("0,1", "0,101"))
    for text in (",", "1x", "x1", "1x2,", "1x2;3x4", "1x2x3", "-1x2", "1x0", "1*2", " 1x2"):
        yield (*COMMANDS["bench-transformers"], "--loads", text)
    for text in ("magic", "bf16,magic", "BF16", "bf16-static", "\x1b[2J", "x" * 5000, "bf16;fp8", " "):
        yield (*COMMANDS["bench"], "--against", text)


def wrong_engine_options() -> Iterator[tuple[str, ...]]:
    """What is no JSON object."""
    for text in (
        "",
        "{",
        "[]",
        "1",
        "null",
        "{'a': 1}",
        "[" * 50000,
        '{"a": 1}}',
        "\x1b[2J",
        '"x"',
        "{1: 2}",
    ):
        for name in ("bench", "eval", "generate"):
            yield (*COMMANDS[name], "--engine-options", text)


def wrong_combinations() -> Iterator[tuple[str, ...]]:
    """Options that have no effect together, or that contradict each other."""
    yield from (
        (*WHOLE,),
        (*WHOLE, "--model", "OUT", "--shape", "llama-3-8b"),
        (*WHOLE, "--shape", "llama-3-8b", "--shape", "llama-2-7b"),
        (*WHOLE, "--shape", "4096x4096"),
        (*WHOLE, "--shape", ""),
        (*WHOLE, "--shape", "llama-3-8b", "--recipe", "none-such"),
        (*WHOLE, "--shape", "llama-3-8b", "--set", "weights.bits=7"),
        (*WHOLE, "--shape", "llama-3-8b", "--layers", "0"),
        (*WHOLE, "--shape", "llama-3-8b", "--layers", "9" * 12),
        (*WHOLE, "--shape", "llama-3-8b", "--recipe", "rrs-paper-w4a4kv4", "--engine", "vllm"),
        (*WHOLE, "--shape", "llama-3-8b", "--engine", "vllm", "-t", "3"),
        (*COMMANDS["bench"], "--device", "cpu"),
        (*COMMANDS["bench"], "--layers", "2"),
        (*COMMANDS["bench"], "--recipe", "rrs-w4a4kv4"),
        (*COMMANDS["bench"], "--set", "head.bits=8"),
        (*COMMANDS["bench"], "--tokens", "1"),
        (*COMMANDS["bench"], "--tune"),
        (*COMMANDS["bench"], "--plot", "x.png"),
        (*COMMANDS["bench"], "--loads", "1x2", "--batch", "1"),
        (*COMMANDS["bench-transformers"], "-t", "2"),
        (*COMMANDS["bench-transformers"], "--engine-options", "{}"),
        (*COMMANDS["bench-transformers"], "--against", "fp8"),
        (*COMMANDS["bench-transformers"], "--context", "1000000"),
        (*COMMANDS["eval"], "--device", "cpu"),
        (*COMMANDS["eval"], "--batch-size", "2"),
        (*COMMANDS["eval"], "--tasks", "kl"),
        (*COMMANDS["eval"], "--tasks", ""),
        ("eval", "OUT", "OUT", "--engine", "vllm", "--tasks", "text:TEXT"),
        ("bench", "--shape", "64x64", "--batch", "1"),
        ("bench", "--shape", "64x64", "--engine", "vllm"),
        ("bench", "--shape", "64x64", "-t", "1"),
        ("bench", "--model", "OUT", "--set", "weights.group_size=64"),
        ("bench", "--shape", "64x64", "--recipe", "gptq-w4a16"),
        ("eval", "OUT", "--engine", "sglang"),
        (*COMMANDS["generate"], "--chat"),
        (*COMMANDS["generate-transformers"], "--temperature", "-1"),
        (*COMMANDS["generate-transformers"], "--temperature", "nan"),
        (*COMMANDS["generate-transformers"], "--temperature", "inf"),
        *((*COMMANDS[name], "--seed", seed) for name in MAKE for seed in ("-1", "x", "9" * 30)),
        (*COMMANDS["generate-transformers"], "--seed", "9" * 30),
        *((*COMMANDS["quantize"], "--max-shard-size", size) for size in ("0", "-1", "", "5 apples", "1e9")),
        (*COMMANDS["quantize"], "--private"),
        (*COMMANDS["quantize"], "--offload-dir", "TEXT/x"),
        (*COMMANDS["quantize"], "--calibration", "EMPTY"),
        (*COMMANDS["quantize"], "--bos", "sometimes"),
        (*COMMANDS["quantize"], "--calibration-data", " "),
        (*COMMANDS["compare"], "--recipes", ","),
        (*COMMANDS["compare"], "--recipes", "none-such"),
        (*COMMANDS["push"], "org/name"),
        COMMANDS["export"],  # By the default recipe.
        *((*COMMANDS["export"], "--max-shard-size", size) for size in ("0", "-1", "", "5 apples")),
        (*COMMANDS["export"], "--dtype", "int4"),
        (*COMMANDS["export"], "--format", "gguf"),
        *(
            ("export", "OUT", "-o", folder, "--overwrite")
            for folder in ("", " ", "OUT", "OUT/x", "TEXT", "\x00")
        ),
    )


def wrong_places() -> Iterator[tuple[str, ...]]:
    """Models that are missing or foreign, and files that cannot be written."""
    for path in (
        "",
        "nowhere/",
        "./nowhere",
        "TEXT",
        "EMPTY",
        "FULL",
        "\x00",
        "~nobody/x",
        "GPTQ",
        "x" * 5000,
    ):
        yield (*WHOLE, "--device", "cpu", "--model", path)
        yield (*WHOLE, "--engine", "vllm", "--model", path)
        yield ("serve", path)
        yield ("export", path, "-o", "made")
        if path not in ("FULL", "GPTQ"):  # Those vLLM serves itself.
            yield ("eval", path, "--engine", "vllm", "--tasks", "text:TEXT")
            yield ("generate", path, "the", "--engine", "vllm")
            yield ("push", path, "org/name")
            yield ("inspect", path)
        if path not in ("FULL", "GPTQ", "EMPTY", "TEXT"):
            yield ("quantize", path, "-o", "made")
            yield ("compare", path, "-o", "made")
            yield ("generate", path, "the")
            yield ("eval", path, "--tasks", "text:TEXT")
            yield ("doctor", path)
    for name in (
        "",
        " ",
        "name",
        "a/b/c",
        "../x",
        "org/",
        "/name",
        "org/na me",
        "org/\x00",
        "o" * 5000 + "/name",
    ):
        yield (*COMMANDS["push"], name)
        yield (*COMMANDS["quantize"], "--push-to-hub", name)
    for path in ("nowhere/x.json", "EMPTY", "TEXT/x.json"):
        yield (*COMMANDS["bench"], "--json", path)
        yield (*COMMANDS["eval"], "--json", path)


WRONG = [
    *wrong_numbers(),
    *wrong_lists(),
    *wrong_engine_options(),
    *wrong_combinations(),
    *wrong_places(),
]


@pytest.fixture(scope="module")
def places(
    qwen2_checkpoint: Path,
    tiny_qwen2_dir: Path,
    tiny_text_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, str]:
    """What the words in capitals stand for."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "empty").mkdir()
    shutil.copytree(tiny_qwen2_dir, folder / "gptq")
    config = json.loads((folder / "gptq" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (folder / "gptq" / "config.json").write_text(json.dumps(config))
    return {
        "OUT": str(qwen2_checkpoint),
        "FULL": str(tiny_qwen2_dir),
        "TEXT": str(tiny_text_file),
        "EMPTY": str(folder / "empty"),
        "GPTQ": str(folder / "gptq"),
    }


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What was started: nothing may be."""
    with StandIn.installed(monkeypatch) as vllm:
        monkeypatch.setattr(process, "run_in_process", vllm.engines.append)
        monkeypatch.setattr("os.execvpe", lambda *words: vllm.engines.append(words))
        yield vllm.engines


def run(words: tuple[str, ...], places: dict[str, str]) -> Result:
    def place(word: str) -> str:
        for name, path in places.items():
            if word == name or word.startswith(f"{name}/") or word.endswith(f":{name}"):
                return word.replace(name, path)
        return word

    environment = {"COLUMNS": "300", "RRSQ_DATA_ROOT": None, "RRSQ_DEBUG": None}
    return CliRunner().invoke(_group(), [place(word) for word in words], env=environment)


@functools.cache
def _group() -> Any:
    """Made once: it takes longer than most of the requests."""
    return get_command(app)


def _python_names(command: str) -> list[str]:
    """Of a command's options, where they are not those of the command line."""
    return [parameter.name for parameter in _group().commands[command].params if "_" in parameter.name]


@pytest.mark.parametrize("words", WRONG, ids=lambda words: ascii(" ".join(words))[:90])
def test_a_wrong_request(
    words: tuple[str, ...],
    places: dict[str, str],
    started: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    begin = time.perf_counter()
    result = run(words, places)
    assert time.perf_counter() - begin < SECONDS
    check(result)
    for name in _python_names(words[0]):
        assert not re.search(rf"\b{name}\b", result.stderr), f"{name} is no word of the command line"
    assert not started
    assert not list(tmp_path.iterdir())


def check(result: Result) -> None:
    """One error of a readable length, by rrsq or by the parser, and its exit code."""
    assert result.exit_code in (1, 2), result.output
    text = result.stderr
    assert text.count("Error: ") + text.count("─ Error ─") == 1, text
    assert "Traceback" not in text
    assert "Unexpected error" not in text
    assert "\x1b" not in text
    assert len(text) < 10_000


def test_random_words_never_end_in_a_traceback(
    places: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Commands put together at random from right and wrong parts: they run, or say one thing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(process, "run_in_process", lambda job: Outcome(job.name, "not run"))
    generator = random.Random(0)
    values = [
        *NUMBERS,
        "1",
        "2",
        "1,2",
        "1x8",
        "vllm",
        "transformers",
        "bf16",
        "{}",
        "OUT",
        "FULL",
        "llama-3-8b",
    ]
    names = ["--model", "--shape", "--engine", "--against", "--batch", "--context", "--loads", "--layers"]
    names += [
        "--new-tokens",
        "--repeats",
        "-t",
        "--engine-options",
        "--recipe",
        "--set",
        "--json",
        "--tokens",
    ]
    with StandIn.installed(monkeypatch):
        for _ in range(40):
            chosen = generator.sample(names, generator.randint(1, 4))
            words = [word for name in chosen for word in (name, generator.choice(values))]
            result = run((*WHOLE, "--device", "cpu", *words), places)
            assert result.exit_code in (1, 2), (words, result.output)
            check(result)
