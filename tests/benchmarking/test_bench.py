"""``rrsq bench`` and what it is made of, on a CPU."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from rrsq.benchmarking.ceilings import Ceilings
from rrsq.benchmarking.contenders import CONTENDERS, contenders_for
from rrsq.benchmarking.linear_scheme import LinearScheme
from rrsq.benchmarking.measure import IncorrectResultError, Settings, measure
from rrsq.benchmarking.problem import make_problems
from rrsq.benchmarking.shapes import MODELS, LinearShape, model_shapes, parse_shape
from rrsq.benchmarking.timing import time_calls
from rrsq.cli.bench import bench
from rrsq.errors import UsageError
from rrsq.recipe import load_recipe

CPU = torch.device("cpu")
DEFAULT = LinearScheme.of(load_recipe("rrs-w4a4kv4"))
FIRST = LinearScheme.of(load_recipe("rrs1-w4a4kv4"))


@pytest.fixture
def run():
    app = typer.Typer()
    app.command()(bench)
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, list(arguments))


def test_parse_shape():
    assert parse_shape("4096x14336:rotated") == LinearShape("4096x14336:rotated", 4096, 14336, True)
    for wrong in ("4096", "4096x", "0x64", "64x100", "64x64:turned"):
        with pytest.raises(UsageError, match="--shape"):
            parse_shape(wrong)


def test_shapes_of_a_named_model():
    shapes = {shape.name: (shape.out_features, shape.in_features) for shape in model_shapes("llama-3-8b")}
    assert shapes == {
        "qkv_proj": (6144, 4096),
        "o_proj": (4096, 4096),
        "gate_up_proj": (28672, 4096),
        "down_proj": (4096, 14336),
    }
    assert all(shape.in_features % 32 == 0 for name in MODELS for shape in model_shapes(name))


def test_shapes_of_a_folder(tmp_path):
    config = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert [str(shape) for shape in model_shapes(str(tmp_path))] == [
        "960x576",
        "576x576",
        "3072x576",
        "576x1536",
    ]
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="hidden_size"):
        model_shapes(str(tmp_path))
    with pytest.raises(UsageError, match=r"Did you mean 'llama-3-8b'"):
        model_shapes("llama3-8b")


def test_time_calls_takes_every_call():
    counts = [0, 0]

    def count(index):
        counts[index] += 1

    assert time_calls([lambda: count(0), lambda: count(1)], CPU, 0.0, False) > 0
    assert min(counts) > 0
    assert counts[0] == counts[1]


def test_the_weight_in_floating_point_is_what_the_packed_one_stands_for():
    problem = make_problems(3, LinearShape("s", 64, 96), CPU, FIRST)[0]
    expected = CONTENDERS["rrsq"].expected(problem)
    relative = (expected - CONTENDERS["cublas"].expected(problem)).norm() / expected.norm()
    assert 0.01 < float(relative) < 0.3  # 4-bit activations


def test_a_wrong_result_is_not_timed(monkeypatch):
    from rrsq.benchmarking import contenders

    real = contenders.kernels.linear_int8
    monkeypatch.setattr(contenders.kernels, "linear_int8", lambda *a: real(*a) * 1.1)
    settings = Settings((LinearShape("s", 64, 64),), (2,), (), CPU, False, 0.0, DEFAULT)
    with pytest.raises(IncorrectResultError, match="rrsq on 64x64 with 2 tokens is off"):
        list(measure(settings, Ceilings(1e9, 1e9), lambda text: None))


def test_rotated_shapes_add_the_rotated_stage():
    def names(rotated, scheme):
        return [contender.name for contender in contenders_for([], LinearShape("s", 64, 64, rotated), scheme)]

    assert "rotate-quantize" in names(True, FIRST)
    assert "rotate-quantize" not in names(False, FIRST)
    # Blocks are rotated in every input, by what quantizes it.
    assert "rotate-quantize" not in names(True, DEFAULT)


@pytest.mark.parametrize(
    ("recipe", "expected", "operation", "arguments"),
    [
        ("rrs-w4a4kv4", (32, 4, 16, 1.0, 16), "quantize_signed", (4, 16, 16)),
        ("rrs-w4a8kv4", (32, 8, None, 1.0, 16), "quantize_signed", (8, None, 16)),
        ("rrs1-w4a4kv4", (32, 4, 16, 0.9333, None), "quantize_tokens", (4, 16, 0.9333)),
        ("rrs1-w4a8kv4", (32, 8, None, 1.0, None), "quantize_tokens", (8, None, 1.0)),
        ("quarot-w4a4kv4", (None, 4, None, 0.9, None), "quantize_tokens", (4, None, 0.9)),
    ],
)
def test_what_is_timed_is_what_the_recipe_says(recipe, expected, operation, arguments, monkeypatch):
    """The calls of the timed linear, by what they are given."""
    from rrsq.benchmarking import contenders

    scheme = LinearScheme.of(load_recipe(recipe))
    assert dataclasses.astuple(scheme) == expected
    problem = make_problems(2, LinearShape("s", 64, 96), CPU, scheme)[0]
    assert (problem.multiplier is None) == (expected[0] is None)
    if problem.multiplier is not None:
        assert problem.multiplier.shape == (64, 96 // expected[0])
    given = []
    real = getattr(contenders.kernels, operation)
    monkeypatch.setattr(
        contenders.kernels, operation, lambda x, *rest, **more: given.append(rest) or real(x, *rest)
    )
    call = CONTENDERS["rrsq-linear"].prepare(problem)
    assert call().shape == (2, 64)
    assert given == [arguments]
    error = (call().double() - CONTENDERS["rrsq-linear"].expected(problem)).norm()
    assert error < 4e-3 * call().double().norm()
    names = [contender.name for contender in contenders_for([], problem.shape, scheme)]
    assert ("rrsq-unsmoothed" in names) == (expected[2] is not None)


def test_groups_divide_the_channels():
    assert FIRST.for_channels(4864 + 8) == LinearScheme(8, 4, 8, 0.9333)
    assert DEFAULT.for_channels(4864 + 8) == LinearScheme(8, 4, 8, 1.0, 8)
    assert DEFAULT.weight_bits == 4.25


@pytest.mark.parametrize("recipe", ["gptq-w4a16", "w16a16kv4", "rrs-paper-w4a4kv4"])
def test_a_recipe_without_an_integer_product_is_refused(recipe):
    with pytest.raises(UsageError, match=rf"{recipe}.*cannot be timed alone"):
        LinearScheme.of(load_recipe(recipe))


def test_a_checkpoint_is_timed_by_its_own_recipe(run, qwen2_checkpoint, tmp_path):
    path = tmp_path / "bench.json"
    words = ("--model", str(qwen2_checkpoint), "--tokens", "1", "--seconds", "0", "--device", "cpu")
    result = run(*words, "--against", "", "--json", str(path))
    assert result.exit_code == 0, result.output
    made = json.loads((qwen2_checkpoint / "config.json").read_text())["quantization_config"]["recipe"]
    report = json.loads(path.read_text())
    assert report["recipe"] == made["name"]
    assert report["scheme"]["group_size"] == made["activations"]["smoothing"]["group_size"]
    result = run(*words, "--set", "weights.group_size=64")
    assert "--set changes a recipe" in str(result.exception)


def test_bench_on_a_cpu(run, tmp_path):
    json_path, plot_path = tmp_path / "bench.json", tmp_path / "bench.png"
    result = run(
        *("--shape", "64x96", "--shape", "64x192:rotated", "--tokens", "1,3", "--device", "cpu"),
        *("--seconds", "0", "--json", str(json_path), "--plot", str(plot_path)),
    )
    assert result.exit_code == 0, result.output
    report = json.loads(json_path.read_text())
    rows = {(row["shape"], row["tokens"], row["name"]): row for row in report["rows"]}
    assert rows["64x96", 1, "cublas"]["ratio"] == 1.0
    assert rows["64x192:rotated", 3, "rrsq-linear"]["microseconds"] > 0
    assert rows["64x96", 3, "fp8"]["reason"] == "needs a CUDA device"
    assert all(row["error"] < 0.1 for row in rows.values() if row["error"] is not None)
    assert plot_path.stat().st_size > 1000
    assert "64x96" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Nothing to time"),
        (("--shape", "64x64", "--tokens", "0"), "--tokens 0"),
        (("--shape", "64x64", "--against", "magic"), "--against magic"),
        (("--model", "gpt-5"), "--model gpt-5"),
        (("--shape", "64x64", "--tune"), "--tune needs a CUDA device"),
    ],
)
def test_usage_errors(run, arguments, message):
    result = run("--device", "cpu", *arguments)
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)
