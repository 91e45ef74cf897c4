"""``rrsq bench --whole``: what is timed and how, on a CPU; vLLM is a stand-in."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from rrsq.benchmarking.whole import loads as whole_loads
from rrsq.benchmarking.whole import models, process, worker
from rrsq.benchmarking.whole.contenders import CONTENDERS
from rrsq.benchmarking.whole.descriptions import describe, public_config, public_shapes
from rrsq.benchmarking.whole.loads import Load, Measurement, measure, parse_loads, prompts_of
from rrsq.benchmarking.whole.plan import Workload, jobs, open_checkpoint, random_model
from rrsq.benchmarking.whole.process import Job, Outcome, run_in_process
from rrsq.benchmarking.whole.random_weights import fill
from rrsq.cli.app import app
from rrsq.errors import UsageError
from rrsq.models import ModelSizes
from rrsq.models.llama import LLAMA
from rrsq.runtime.format.format import parse_info
from rrsq.runtime.format.validate import check_description
from tiny_families import TINY
from tiny_quantized import recipe_of
from tiny_vllm import StandIn

ROOT = Path(__file__).parents[2]
ONE = Workload((Load(2, 5),), 3, 1)


def rrsq_bench(*words: object) -> Result:
    return CliRunner().invoke(app, ["bench", "--whole", *map(str, words)])


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The worker runs here, so that a contender costs no imports."""
    numbers = iter(range(100))

    def run(words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert words[1:3] == ["-m", worker.__name__]
        try:
            worker.main(Path(words[3]))
        except Exception as error:
            return subprocess.CompletedProcess(words, 1, f"{next(numbers)}\n{error}")
        return subprocess.CompletedProcess(words, 0, "")

    monkeypatch.setattr(process.subprocess, "run", run)


@pytest.fixture
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(LLAMA.public, "SmolLM2-135M", ModelSizes(64, 96, 4, 2, 16, 2))
    return "smollm2-135m"


# What is measured


def test_a_step_is_what_is_left_without_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only the engine moves: 7 s for a prompt, 2 s for a token, and a hiccup of 90 s."""
    now = [0.0]
    calls: list[tuple[int, int]] = []

    def generate(prompts: list[list[int]], tokens: int) -> None:
        calls.append((len(prompts), tokens))
        now[0] += 7 + 2 * tokens + (90 if len(calls) in (3, 6) else 0)

    monkeypatch.setattr(whole_loads.time, "perf_counter", lambda: now[0])
    measured = measure(generate, Load(4, 6), 50, 11, repeats=3)
    assert calls == [(4, 1), (4, 11), *[(4, 1)] * 3, *[(4, 11)] * 3]
    assert (measured.decode, measured.prefill) == (2000, 9000)
    assert (measured.decode_median, measured.prefill_median) == (2000, 9000)
    assert measured.tokens_per_second == 2
    assert measured.prompt_tokens_per_second == pytest.approx(24 / 9)


def test_prompts_are_the_same_for_every_contender() -> None:
    prompts = prompts_of(Load(3, 40), 11)
    assert prompts == prompts_of(Load(3, 40), 11)
    assert [len(prompt) for prompt in prompts] == [40] * 3
    assert len({tuple(prompt) for prompt in prompts}) == 3
    assert set().union(*prompts) == set(range(11))


def test_loads() -> None:
    assert parse_loads("1x128,16x1024,1x128") == (Load(1, 128), Load(16, 1024))
    for wrong in ("", "1", "0x4", "1x", "1x2,", "1x-2", "a×b", "1x9999999999"):
        with pytest.raises(UsageError, match="--loads"):
            parse_loads(wrong)


# What is timed


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("bits", [8, 16])
def test_a_description_is_that_of_a_checkpoint(name: str, bits: int) -> None:
    """A tied head shares the codes of the embedding; one of 8 bits beside an embedding of 16 is untied."""
    config = TINY[name]()
    described = describe(config, recipe_of("rrs-w4a4kv4", [f"embedding.bits={bits}"]))
    check_description(config, parse_info(described["quantization_config"]))
    assert described["tie_word_embeddings"] is (config.tie_word_embeddings and bits == 8)
    assert type(config)(**described).get_text_config().hidden_size == config.get_text_config().hidden_size


def test_a_tied_head_that_nothing_changes_stays_tied() -> None:
    config = TINY["qwen2"]()
    assert config.tie_word_embeddings
    assert describe(config, recipe_of("gptq-w4a16"))["tie_word_embeddings"]


def test_shapes_of_public_models() -> None:
    config = public_config("LLAMA-3-8b", layers=5)
    sizes = (config.hidden_size, config.intermediate_size, config.vocab_size, config.num_hidden_layers)
    assert sizes == (4096, 14336, 128256, 5)
    mixture = public_config("Qwen3-30B-A3B")
    assert (mixture.num_experts, mixture.moe_intermediate_size) == (128, 768)
    for name in public_shapes():
        assert describe(public_config(name), recipe_of("rrs-w4a4kv4"))["architectures"]
    with pytest.raises(UsageError, match=r"Did you mean 'Llama-3-8B'"):
        public_config("Llama3-8B")


def test_integers_become_random_and_numbers_stay_in_range() -> None:
    model = torch.nn.Module()
    model.weight_packed = torch.nn.Parameter(torch.zeros(64, 32, dtype=torch.uint8), requires_grad=False)
    model.register_buffer("weight_multiplier", torch.zeros(64, 4, dtype=torch.uint8))
    model.register_buffer("weight_scale", torch.full((64,), float("nan")))
    model.register_buffer("positions", torch.zeros(8, dtype=torch.int64))
    assert fill(model) == 64 * 32 + 64 * 4 + 64 * 4 + 8 * 8
    assert len(model.weight_packed.unique()) > 200
    assert set(model.weight_multiplier.unique().tolist()) == set(range(1, 16))
    assert (model.weight_scale > 0).all()
    assert not model.positions.any()


def test_contenders_have_the_shape_of_the_checkpoint(qwen2_checkpoint: Path) -> None:
    subject = open_checkpoint(str(qwen2_checkpoint))
    made = jobs(subject, "vllm", ["fp8", "w4afp8", "bf16", "fp8"], ONE, {"seed": 1})
    assert [job.name for job in made] == ["bf16", "fp8", "w4afp8", "rrsq"]
    dense, fp8, compressed, ours = made
    own = json.loads((qwen2_checkpoint / "config.json").read_text())
    del own["quantization_config"]
    assert dense.description == {**own, "dtype": "bfloat16"}
    assert fp8.description == dense.description
    assert fp8.options == {"seed": 1, "quantization": "fp8"}
    assert compressed.description is not None
    section = compressed.description["quantization_config"]
    assert section["config_groups"]["group_0"]["input_activations"]["num_bits"] == 8
    assert (ours.folder, ours.description) == (str(qwen2_checkpoint), None)


def test_a_load_beyond_the_context_is_refused(qwen2_checkpoint: Path) -> None:
    subject = open_checkpoint(str(qwen2_checkpoint))
    subject.config.max_position_embeddings = 8
    assert jobs(subject, "vllm", [], ONE, {})
    subject.config.max_position_embeddings = 7
    with pytest.raises(UsageError, match="exceed the model's context of 7"):
        jobs(subject, "vllm", [], ONE, {})


def test_a_made_up_model_is_like_a_loaded_one(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    """Random codes in the modules of a checkpoint: the same tensors, and numbers come out."""
    description = json.loads((qwen2_checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(description))
    loaded: Any = models._load(qwen2_checkpoint, torch.device("cpu"))
    made: Any = models._make_up(tmp_path, torch.device("cpu"))

    def sizes(model: Any) -> dict[str, Any]:
        return {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}

    assert sizes(made) == sizes(loaded)
    with torch.no_grad():
        logits = made(torch.tensor([[1, 2, 3]])).logits
    assert torch.isfinite(logits).all()
    assert logits.std() > 0


# A process


def test_a_contender_in_a_process_of_its_own(qwen2_checkpoint: Path) -> None:
    job = Job("rrsq", "transformers", str(qwen2_checkpoint), None, {"device": "cpu"}, ONE.loads, 3, 1)
    outcome = run_in_process(job)
    assert outcome.reason is None
    assert [(each.batch, each.context) for each in outcome.measurements] == [(2, 5)]
    assert outcome.measurements[0].prefill > 0
    stored = (qwen2_checkpoint / "model.safetensors").stat().st_size
    assert outcome.weight_bytes > 0.5 * stored
    assert outcome.start_seconds > 0


def test_what_was_measured_before_it_failed_is_kept(
    qwen2_checkpoint: Path, in_this_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = models._InTransformers.generate

    def generate(self: Any, prompts: list[list[int]], tokens: int) -> Any:
        if len(prompts) == 3:
            raise torch.OutOfMemoryError("no room\nfor more")
        return real(self, prompts, tokens)

    monkeypatch.setattr(models._InTransformers, "generate", generate)
    loads = (Load(1, 4), Load(3, 4), Load(1, 5))
    job = Job("rrsq", "transformers", str(qwen2_checkpoint), None, {"device": "cpu"}, loads, 3, 1)
    outcome = run_in_process(job)
    assert outcome.reason == "OutOfMemoryError: no room"
    assert outcome.log[-2:] == ("no room", "for more")
    assert [outcome.measurement(load) is not None for load in loads] == [True, False, False]


@pytest.mark.parametrize(
    ("own", "said", "code", "expected"),
    [
        ("ValueError: so", ["x"], 1, "ValueError: so"),
        (None, ["a", "b"], -9, "its process was ended by signal 9 (out of memory?)"),
        (None, ["a", "b"], 3, "b"),
        (None, [], 3, "it ended with exit code 3"),
        (
            "EngineError: RuntimeError: Engine core initialization failed. See root cause above.",
            ["(EngineCore pid=7) ERROR 01:02 torch.OutOfMemoryError: no room", "at", "See root cause above"],
            1,
            "torch.OutOfMemoryError: no room",
        ),
    ],
)
def test_the_reason_is_one_line(own: str | None, said: list[str], code: int, expected: str) -> None:
    assert process._reason(own, said, code) == expected


# In vLLM


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with StandIn.installed(monkeypatch) as stand_in:
        yield stand_in


def test_vllm_is_asked_for_as_many_tokens_as_are_timed(
    vllm: StandIn, qwen2_checkpoint: Path, in_this_process: None, tmp_path: Path
) -> None:
    path = tmp_path / "bench.json"
    words = ("--engine", "vllm", "--model", qwen2_checkpoint, "--against", "bf16,w4a16", "--loads", "2x5,1x7")
    options = ("--new-tokens", 4, "--repeats", 1, "--engine-options", '{"seed": 3}', "--json", path)
    vllm.fails_on = "pack-quantized"
    result = rrsq_bench(*words, *options)
    assert result.exit_code == 0, result.output
    dense, ours = vllm.engines
    assert dense.options["load_format"] == "dummy"
    assert ours.options["load_format"] == "auto"
    assert ours.options["model"] == str(qwen2_checkpoint)
    for engine in (dense, ours):
        assert engine.options["tensor_parallel_size"] == 1
        assert engine.options["max_model_len"] == 7 + 4
        assert (engine.options["seed"], engine.options["enable_prefix_caching"]) == (3, False)
        asked = [(len(prompts), len(prompts[0]), sampling.max_tokens) for prompts, sampling in engine.asked]
        assert asked == [
            (2, 5, 1),
            (2, 5, 4),
            (2, 5, 1),
            (2, 5, 4),
            (1, 7, 1),
            (1, 7, 4),
            (1, 7, 1),
            (1, 7, 4),
        ]
        assert all(
            sampling.ignore_eos and sampling.min_tokens == sampling.max_tokens for _, sampling in engine.asked
        )
    assert [prompts for prompts, _ in dense.asked] == [prompts for prompts, _ in ours.asked]
    report = json.loads(path.read_text())
    assert [outcome["name"] for outcome in report["outcomes"]] == ["bf16", "w4a16", "rrsq"]
    assert "no pack-quantized here" in report["outcomes"][1]["reason"]
    assert report["outcomes"][2]["cache_tokens"] == StandIn.CACHE_TOKENS
    assert report["outcomes"][0]["measurements"][0]["decode_ratio"] == 1.0
    assert "no pack-quantized here" in result.stderr


def test_without_vllm_it_says_how_to_install_it(qwen2_checkpoint: Path) -> None:
    result = rrsq_bench("--engine", "vllm", "--model", qwen2_checkpoint)
    assert result.exit_code == 2
    assert "pip install 'rrsq[vllm]'" in result.stderr


def test_without_a_gpu_it_says_so(
    vllm: StandIn, qwen2_checkpoint: Path, fully_rotated_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ("--recipe", "rrs1-w4a4kv4")
    for what in (("--model", fully_rotated_checkpoint), ("--shape", "llama-3-8b", *first)):
        # The rotations of the first generation serve one process, which is looked at first.
        result = rrsq_bench("--engine", "vllm", *what, "-t", 2)
        assert result.exit_code == 2
        assert "rotation.shards=2" in result.stderr
    words = ("--shape", "llama-3-8b", *first, "--set", "rotation.shards=2", "-t", 2)
    monkeypatch.setattr("rrsq.vllm.engine._gpus", lambda: 1)
    result = rrsq_bench("--engine", "vllm", *words)
    assert "vLLM needs 2 NVIDIA GPUs; torch sees 1" in result.stderr
    # Blocks of the default recipe lie within a process.
    result = rrsq_bench("--engine", "vllm", "--shape", "llama-3-8b", "-t", 2)
    assert "vLLM needs 2 NVIDIA GPUs; torch sees 1" in result.stderr
    monkeypatch.setattr("rrsq.vllm.engine._gpus", lambda: 0)
    result = rrsq_bench("--engine", "vllm", "--model", qwen2_checkpoint)
    assert "vLLM needs 1 NVIDIA GPU; torch sees none" in result.stderr


# The command


def test_bench_of_a_shape(tiny_shape: str, in_this_process: None, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    result = rrsq_bench(
        *("--shape", tiny_shape, "--layers", 1, "--batch", "1,2", "--context", 6, "--new-tokens", 3),
        *("--repeats", 1, "--device", "cpu", "--json", path, "--set", "weights.group_size=16"),
    )
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    assert [outcome["name"] for outcome in report["outcomes"]] == ["bf16", "bf16-static", "rrsq"]
    assert {outcome["reason"] for outcome in report["outcomes"]} == {None}
    dense, static, ours = report["outcomes"]
    assert dense["weight_bytes"] == static["weight_bytes"] > ours["weight_bytes"]
    assert report["model"] == f"{tiny_shape}, 1 layers"
    for outcome in report["outcomes"]:
        assert [(one["batch"], one["context"]) for one in outcome["measurements"]] == [(1, 6), (2, 6)]
        for first, one in zip(dense["measurements"], outcome["measurements"], strict=True):
            assert one["prefill_ratio"] == pytest.approx(first["prefill"] / one["prefill"])
    assert "2x6" in result.stdout
    assert "Ratios are to bf16 in this run" in result.stderr


def test_a_static_cache_is_what_transformers_makes(
    tiny_shape: str, in_this_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import GenerationMixin

    caches: list[Any] = []
    real: Callable[..., Any] = GenerationMixin.generate

    def generate(self: Any, *arguments: Any, **options: Any) -> Any:
        caches.append(options.get("cache_implementation"))
        return real(self, *arguments, **options)

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    subject = random_model(tiny_shape, recipe_of("rrs-w4a4kv4"))
    for job in jobs(subject, "transformers", ["bf16", "bf16-static"], ONE, {"device": "cpu"}):
        assert run_in_process(job).reason is None
    assert caches == [None] * 4 + ["static"] * 4 + [None] * 4


def test_if_nothing_ran_that_is_an_error(
    qwen2_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(process, "run_in_process", lambda job: Outcome(job.name, "it is broken"))
    path = tmp_path / "bench.json"
    result = rrsq_bench("--model", qwen2_checkpoint, "--device", "cpu", "--json", path)
    assert result.exit_code == 1
    assert "None of the models ran. The last one: it is broken" in result.stderr
    assert "did not run" in result.stdout
    assert len(json.loads(path.read_text())["outcomes"]) == 3


def test_ratios_need_bf16_in_the_same_run(
    qwen2_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(job: Job) -> Outcome:
        speed = 1.0 if job.name == "rrsq" else 4.0
        measured = [Measurement(one.batch, one.context, speed, speed, speed, speed) for one in job.loads]
        return Outcome(job.name, device="no GPU", measurements=tuple(measured))

    monkeypatch.setattr(process, "run_in_process", run)
    words = ("--model", qwen2_checkpoint, "--device", "cpu", "--loads", "1x8")
    path = tmp_path / "bench.json"
    for against, ratio in (("bf16", 4.0), ("bf16-static", None), ("", None)):
        assert rrsq_bench(*words, "--against", against, "--json", path).exit_code == 0
        ours = json.loads(path.read_text())["outcomes"][-1]["measurements"][0]
        assert (ours["decode_ratio"], ours["prefill_ratio"]) == (ratio, ratio)
        assert ours == {**ours, **asdict(Measurement(1, 8, 1.0, 1.0, 1.0, 1.0))}


@pytest.mark.parametrize("engine", CONTENDERS)
def test_a_contender_of_another_engine(engine: str, qwen2_checkpoint: Path) -> None:
    other = {"vllm": "bf16-static", "transformers": "fp8"}[engine]
    subject = open_checkpoint(str(qwen2_checkpoint))
    with pytest.raises(
        UsageError, match=f"--against {other}: with --engine {engine} there are bf16,.*It is one of"
    ):
        jobs(subject, engine, [other], ONE, {})


def test_the_example_explains_itself() -> None:
    words = [sys.executable, str(ROOT / "examples" / "serving_parity.py"), "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "vLLM" in done.stdout
