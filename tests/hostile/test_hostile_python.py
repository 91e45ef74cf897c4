"""Arguments of ``rrsq.quantize``, ``rrsq.evaluate`` and ``rrsq.load``: one error each, nothing written.

Values are of the right type and wrong, of a wrong type, or absurd. What is no parameter at all is Python's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rrsq
from rrsq.errors import RRSQError

SECONDS = 30.0  # Of the processor, whatever else the machine does.
NO_NUMBERS: tuple[Any, ...] = (0, -1, 1.5, "8", None, float("nan"), 10**30)
NO_PATHS: tuple[Any, ...] = (
    "",
    "nowhere/",
    "./nowhere",
    "\x00",
    "x" * 5000,
    "~nobody/x",
    None,
    3,
    b"x",
    ["x"],
)
NO_DEVICES: tuple[Any, ...] = ("", "gpu", "cuda:x", "cuda:99", "CPU", "meta", None, 3)
NO_BOS: tuple[Any, ...] = ("", "sometimes", "AUTO", None, True, 1)

WRONG_QUANTIZE: dict[str, tuple[Any, ...]] = {
    "model": (*NO_PATHS, "EMPTY", "TEXT"),
    "output": ("", "\x00", "TEXT", "TEXT/out", None, 3, b"x", ["x"]),
    "recipe": ("", "none-such", "nowhere.yaml", "EMPTY", "TEXT", "\x00", "x" * 5000, None, 3, {}, ["x"]),
    "overrides": (
        "weights.bits",
        ["x"],
        [""],
        ["=3"],
        ["weights.bits=7"],
        ["weights=\x00"],
        [3],
        None,
        3,
        "[",
    ),
    "ignore": ("*.none", ["*.none"], ["["], [""], [3], [None], None, 3),
    "calibration_data": ("", "nowhere.txt", "EMPTY", "\x00", "x" * 5000, None, 3, b"x"),
    "num_samples": NO_NUMBERS,
    "sequence_length": (*NO_NUMBERS, 7),
    "bos": NO_BOS,
    "seed": (-1, 1.5, "0", None, 2**80),
    "calibration": ("", "nowhere", "EMPTY", "TEXT", "\x00", 3, b"x"),
    "device": NO_DEVICES,
    "data_root": (3, b"x", ["x"]),
    "max_shard_size": ("", "0", "-1GB", "5 apples", "nan", "1e400GB", None, 5, True),
    "offload_dir": ("TEXT", "TEXT/x", "\x00", 3, b"x"),
}
WRONG_EVALUATE: dict[str, tuple[Any, ...]] = {
    "models": (*NO_PATHS, "EMPTY", "TEXT", [], [""], [3], [None], {}),
    "tasks": ("", [], ",", "kl", ["kl"], "none-such", "text:nowhere", "text:", "\x00", None, 3, [3], [""]),
    "limit": NO_NUMBERS[:4] + NO_NUMBERS[5:6],
    "num_fewshot": (-1, 1.5, "2", float("nan")),
    "sequence_length": (*NO_NUMBERS, 1),
    "context": (*NO_NUMBERS, [], [0], [64, "64"], {}),
    "depths": (*NO_NUMBERS[1:], [], [101], -1, [50, None]),
    "bos": NO_BOS,
    "batch_size": (0, -1, 1.5, "auto", float("nan")),
    "device": NO_DEVICES,
    "dtype": ("", "int8", "float", "FLOAT32", None, 3),
    "data_root": (3, b"x", ["x"]),
    "engine": ("", "sglang", "VLLM", None, 3),
    "tensor_parallel_size": NO_NUMBERS,
    "engine_options": ("", "[]", "{", None, 3),
}
WRONG_LOAD: dict[str, tuple[Any, ...]] = {
    "path": (*NO_PATHS, "EMPTY", "TEXT"),
    "device": NO_DEVICES,
    "dtype": ("", "int8", "float", "FLOAT32", "\x00", 3, torch.int8),
    "device_map": ("magic", "", {"": "cuda:99"}, 3.5),
    "data_root": (3, b"x", ["x"]),
}


def cases(wrong: dict[str, tuple[Any, ...]]) -> list[Any]:
    return [
        pytest.param(name, value, id=ascii(f"{name}={value!r:.40}"))
        for name, values in wrong.items()
        for value in values
    ]


@pytest.fixture(scope="module")
def places(tiny_text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the words in capitals stand for."""
    return {"TEXT": str(tiny_text_file), "EMPTY": str(tmp_path_factory.mktemp("empty"))}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RRSQ_DATA_ROOT", raising=False)


def placed(value: Any, places: dict[str, str]) -> Any:
    for word, path in places.items():
        if isinstance(value, str) and (value == word or value.startswith(f"{word}/")):
            return value.replace(word, path)
    return value


def assert_one_error(function: Callable[..., Any], arguments: dict[str, Any], folder: Path) -> None:
    begin = time.process_time()
    with pytest.raises(RRSQError) as caught:
        function(**arguments)
    assert time.process_time() - begin < SECONDS
    assert 10 < len(str(caught.value)) < 1000
    assert not list(folder.iterdir())


@pytest.mark.parametrize(("name", "value"), cases(WRONG_QUANTIZE))
def test_quantize(
    name: str, value: Any, places: dict[str, str], tiny_qwen2_dir: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    right = {
        "model": tiny_qwen2_dir,
        "output": "out",
        "calibration_data": tiny_text_file,
        "num_samples": 2,
        "sequence_length": 16,
        "device": "cpu",
    }
    assert_one_error(rrsq.quantize, {**right, name: placed(value, places)}, tmp_path)


@pytest.mark.parametrize(("name", "value"), cases(WRONG_EVALUATE))
def test_evaluate(
    name: str,
    value: Any,
    places: dict[str, str],
    qwen2_checkpoint: Path,
    tiny_text_file: Path,
    tmp_path: Path,
) -> None:
    right = {
        "models": qwen2_checkpoint,
        "tasks": f"text:{tiny_text_file}",
        "limit": 1,
        "sequence_length": 16,
        "device": "cpu",
    }
    assert_one_error(rrsq.evaluate, {**right, name: placed(value, places)}, tmp_path)


@pytest.mark.parametrize(("name", "value"), cases(WRONG_LOAD))
def test_load(name: str, value: Any, places: dict[str, str], qwen2_checkpoint: Path, tmp_path: Path) -> None:
    assert_one_error(rrsq.load, {"path": qwen2_checkpoint, name: placed(value, places)}, tmp_path)
