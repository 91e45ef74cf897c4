"""``rrsq doctor`` on this machine and on machines that it is told of."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import Result
from transformers import Gemma2Config, LlamaConfig, OPTConfig, Phi3Config, Qwen2Config, Qwen2MoeConfig
from typer.testing import CliRunner

from rrsq import doctor
from rrsq.cli import console
from rrsq.cli.app import app
from rrsq.doctor import Finding, examine
from rrsq.kernels.operation import Target
from rrsq.model_kernels import examine_model


def rrsq_doctor(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "200", "RRSQ_DATA_ROOT": None})


def by_subject(findings: tuple[Finding, ...]) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the variables that doctor remarks on."""
    for name in ("RRSQ_KERNELS", "TRITON_INTERPRET", "HF_HUB_OFFLINE", "RRSQ_DATA_ROOT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("plain")
def test_this_machine(tiny_hub: Path) -> None:
    result = rrsq_doctor("--data-root", str(tiny_hub))
    assert result.exit_code == 0, result.output
    assert importlib.metadata.version("transformers") in result.stdout
    assert importlib.metadata.version("lm_eval") in result.stdout
    assert f"{tiny_hub}: " in result.stdout
    assert "Salesforce/wikitext" in result.stdout
    for name in ("hadamard_transform", "linear_int8", "linear_w4a16"):
        assert name in result.stdout


@pytest.mark.usefixtures("plain")
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU does")
def test_without_a_gpu_the_reference_is_used_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = examine()
    kernels = by_subject(findings.kernels)
    assert kernels["linear_int8"].found == "eager.linear_int8"
    assert kernels["not used"].found.startswith("all of triton: ")
    assert "runs on cuda, not on cpu" in kernels["not used"].found
    for plugged_in, cuda, state, found in (
        (False, "12.8", "note", "none"),
        (True, None, "problem", "torch was built without CUDA"),
        (True, "12.8", "problem", "torch cannot use it"),
    ):
        monkeypatch.setattr(doctor, "_gpu_is_plugged_in", lambda plugged_in=plugged_in: plugged_in)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        gpu = by_subject(examine().hardware)["GPU"]
        assert gpu.state == state
        assert found in gpu.found
        assert gpu.hint


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("capability", [(9, 0), (7, 5)])
def test_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: tuple[int, int]) -> None:
    name = "NVIDIA Unheard 5"
    fake: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda index: SimpleNamespace(name=name),
        "get_device_name": lambda device: name,
        "get_device_capability": lambda index: capability,
        "mem_get_info": lambda index: (10 * 10**9, 20 * 10**9),
    }
    for function, value in fake.items():
        monkeypatch.setattr(torch.cuda, function, value)
    monkeypatch.setenv("RRSQ_CACHE", str(tmp_path))
    findings = examine()
    gpu, kernels = by_subject(findings.hardware)["GPU 0"], by_subject(findings.kernels)
    assert f"{name}, compute capability {capability[0]}.{capability[1]}, 20.0 GB, 10.0 GB free" in gpu.found
    assert "bench" in kernels["tile sizes"].hint
    if capability == (9, 0):
        assert gpu.state == "ok"
        assert kernels["linear_int8"].found == "triton.linear_int8"
        assert "kernels" not in kernels
    else:
        assert gpu.state == "note"
        assert (kernels["linear_int8"].found, kernels["linear_int8"].state) == (
            "eager.linear_int8",
            "note",
        )
        assert "needs compute capability 8.0, this device has 7.5" in kernels["not used"].found
        assert "slow" in kernels["kernels"].hint
    (tmp_path / "kernels-nvidia-unheard-5.json").write_text("{}")
    assert str(tmp_path) in by_subject(examine().kernels)["tile sizes"].found


def test_problems_have_hints_and_exit_with_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr("rrsq.kernels.operation._from_environment", lambda: "triton")
        result = rrsq_doctor()
        assert result.exit_code == 1
        assert "A model cannot run here" in result.stdout
        monkeypatch.undo()
    result = rrsq_doctor("--data-root", str(tmp_path / "nowhere"))
    assert result.exit_code == 1
    assert "nowhere' (--data-root or RRSQ_DATA_ROOT) is not a folder" in result.stdout
    (tmp_path / "empty").mkdir()
    result = rrsq_doctor("--data-root", str(tmp_path / "empty"))
    assert "empty: empty" in result.stdout


@pytest.mark.usefixtures("plain")
def test_libraries_that_are_missing_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "lm_eval":
            raise importlib.metadata.PackageNotFoundError(name)
        return "4.57.0" if name == "transformers" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["transformers<6,>=5.17", "torch>=2.8"])
    libraries = by_subject(examine().libraries)
    assert libraries["torch"].state == "ok"
    assert libraries["transformers"].state == "problem"
    assert "<6,>=5.17" in libraries["transformers"].hint
    assert libraries["lm_eval"].state == "note"
    assert 'pip install "rrsq[eval]"' in libraries["lm_eval"].hint


def test_bounds_are_those_of_the_project() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    for name, bound in doctor._bounds().items():
        if name in ("torch", "transformers"):
            assert all(part in text for part in (f'"{name}', *bound.split(",")))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a user whom a folder can refuse")
def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    monkeypatch.setenv("RRSQ_CACHE", str(tmp_path / "cache"))
    finding = by_subject(examine().storage)["rrsq cache"]
    tmp_path.chmod(0o700)
    assert finding.state == "problem"


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


GPU = Target("cuda", (9, 0), assumed=True)


def config_folder(folder: Path, config: Any) -> str:
    config.save_pretrained(folder)
    return str(folder)


def steps_of(name: str, recipe: str | None = None, target: Target = GPU) -> dict[str, tuple[str | None, ...]]:
    """By input, ``backend operation`` of what prepares and of what multiplies it."""
    return {
        one.path: tuple(
            step and f"{step.backend} {step.operation}" for step in (one.preparation, one.product)
        )
        for one in examine_model(name, recipe, target).inputs
    }


LLAMA = {"num_hidden_layers": 2, "vocab_size": 96}
# Public models with inputs that no Triton kernel rotates, and why: docs/limitations.md.
SLOW = {
    "Qwen2.5-72B": (
        "mlp.down",
        "hadamard_rows = 924 is more than 256",
        lambda: Qwen2Config(
            hidden_size=8192,
            intermediate_size=29568,
            num_attention_heads=64,
            num_key_value_heads=8,
            **LLAMA,
        ),
    ),
    "Gemma-2-27B": (
        "mlp.down",
        "channels = 36864 is more than 32768",
        lambda: Gemma2Config(
            hidden_size=4608,
            intermediate_size=36864,
            num_attention_heads=32,
            num_key_value_heads=16,
            head_dim=128,
            **LLAMA,
        ),
    ),
    "Llama-3.1-405B": (
        "mlp.down",
        "channels = 53248 is more than 32768",
        lambda: LlamaConfig(
            hidden_size=16384,
            intermediate_size=53248,
            num_attention_heads=128,
            num_key_value_heads=8,
            **LLAMA,
        ),
    ),
    "OPT-66B": (
        "down",
        "channels = 36864 is more than 32768",
        lambda: OPTConfig(
            hidden_size=9216, ffn_dim=36864, num_attention_heads=72, word_embed_proj_dim=9216, **LLAMA
        ),
    ),
    "Phi-3-mini": (
        "self_attn.o",
        "hadamard_columns = 96 is not a power of two",
        lambda: Phi3Config(
            hidden_size=3072, intermediate_size=8192, num_attention_heads=32, pad_token_id=0, **LLAMA
        ),
    ),
    "OPT-2.7b": (
        "self_attn.o",
        "hadamard_columns = 80 is not a power of two",
        lambda: OPTConfig(
            hidden_size=2560, ffn_dim=10240, num_attention_heads=32, word_embed_proj_dim=2560, **LLAMA
        ),
    ),
}


@pytest.mark.parametrize("name", SLOW)
def test_inputs_of_public_models_that_run_eager_are_named(name: str, tmp_path: Path) -> None:
    path, why, make = SLOW[name]
    model = config_folder(tmp_path, make())
    found = examine_model(model, "rrs1-w4a4kv4", GPU)
    slow = {one.path: step for one in found.inputs for step in one.steps if step.backend == "eager"}
    assert list(slow) == [path]
    assert slow[path].operation == "quantize_tokens"
    assert slow[path].reasons == (why,)
    assert [one.layers for one in found.inputs] == [(0, 1)] * 4 + [()]
    # Rotated in blocks, none of them does.
    assert "eager" not in {
        step.backend for one in examine_model(model, None, GPU).inputs for step in one.steps
    }


def test_each_recipe_names_its_operations(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}
    model = config_folder(tmp_path, LlamaConfig(**sizes, **LLAMA))
    quantize, product = "triton quantize_tokens", "triton linear_int8"
    default = steps_of(model)
    assert default["self_attn.qkv"] == default["mlp.down"] == ("triton quantize_signed", product)
    assert default["lm_head"] == (None, "triton linear_w8a16")
    first = steps_of(model, "rrs1-w4a4kv4")
    assert first["lm_head"] == (None, "None library")
    assert first["self_attn.qkv"] == first["mlp.down"] == (quantize, product)
    paper = steps_of(model, "rrs-paper-w4a4kv4")
    assert paper["self_attn.qkv"] == (quantize, product)
    assert paper["mlp.down"] == ("triton quantize_smoothed", "triton linear_group_scaled")
    weights = steps_of(model, "gptq-w4a16")
    assert weights["mlp.gate_up"] == (None, "triton linear_w4a16")
    assert set(steps_of(model, target=Target("cpu"))["mlp.down"]) == {
        "eager quantize_signed",
        "eager linear_int8",
    }


def test_layers_that_differ_and_linears_that_stay(tmp_path: Path) -> None:
    """A mixture with a dense layer; one linear is kept in 16 bits behind its input's rotation."""
    config = Qwen2MoeConfig(
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_hidden_layers=3,
        mlp_only_layers=[1],
        num_experts=4,
        vocab_size=96,
    )
    model = config_folder(tmp_path / "model", config)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "rotation: {}\nweights: {group_size: 32}\nactivations: {bits: 4, smoothing: {}}\n"
        "head: {bits: 4}\nmodules_to_not_convert: ['*.1.mlp.down_proj', '*.self_attn.q_proj']\n"
    )
    found = examine_model(model, str(recipe), GPU)
    layers = {one.path: one.layers for one in found.inputs}
    assert layers == {
        "self_attn.qkv": (0, 1, 2),
        "self_attn.qkv (16 bits)": (0, 1, 2),
        "self_attn.o": (0, 1, 2),
        "mlp.shared_expert.gate_up": (0, 2),
        "mlp.shared_expert.down": (0, 2),
        "mlp.experts.gate_up": (0, 2),
        "mlp.experts.down": (0, 2),
        "mlp.gate_up": (1,),
        "mlp.down": (1,),
        "lm_head": (),
    }
    steps = steps_of(model, str(recipe))
    assert steps["mlp.experts.down"] == ("triton quantize_tokens", "triton grouped_linear")
    assert steps["mlp.down"] == ("triton hadamard_transform", "None library")
    assert steps["self_attn.qkv (16 bits)"] == (None, "None library")
    assert steps["lm_head"] == (None, "triton linear_w4a16")
    recipe.write_text(recipe.read_text().replace("head: {bits: 4}", "head: {bits: 8}"))
    assert steps_of(model, str(recipe))["lm_head"] == (None, "triton linear_w8a16")


@pytest.mark.usefixtures("plain", "no_gpu")
def test_the_report_of_a_model_fits_80_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.stdout, "_width", 80)
    model = config_folder(tmp_path, SLOW["Qwen2.5-72B"][2]())
    result = rrsq_doctor(model, "--recipe", "rrs1-w4a4kv4")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.split()[:4] == ["✓", "self_attn.qkv", "0-1", "8192"] for line in lines)
    assert any(line.startswith("! mlp.down: quantize_tokens, eager") for line in lines)
    assert "compute capability 9.0 (there is none here" in result.stdout.replace("\n", " ")


@pytest.mark.usefixtures("plain", "no_gpu")
def test_a_checkpoint_is_looked_at_with_its_own_recipe(qwen2_checkpoint: Path) -> None:
    result = rrsq_doctor(str(qwen2_checkpoint))
    assert result.exit_code == 0, result.output
    assert "its own recipe" in result.stdout
    result = rrsq_doctor(str(qwen2_checkpoint), "--recipe", "rtn-w4a4")
    assert result.exit_code == 2
    assert "quantized already" in result.output


@pytest.mark.usefixtures("plain", "no_gpu")
def test_errors_of_a_model(tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, complaint in (
        (["--recipe", "rtn-w4a4"], "--recipe goes with a MODEL"),
        ([str(tmp_path / "nowhere")], "nowhere"),
        ([str(tiny_llama_dir), "--recipe", "rtn-w4a5"], "Did you mean"),
    ):
        result = rrsq_doctor(*arguments)
        assert result.exit_code == 2, result.output
        assert complaint in result.output
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert rrsq_doctor(str(tmp_path)).exit_code == 2
    monkeypatch.setattr("rrsq.kernels.operation._from_environment", lambda: "triton")
    model = config_folder(tmp_path / "slow", SLOW["Phi-3-mini"][2]())
    result = rrsq_doctor(model, "--recipe", "rrs1-w4a4kv4")
    assert result.exit_code == 1
    assert "quantize_tokens, no kernel" in result.stdout
    assert "the backend triton was asked for" in result.stdout.replace("\n", " ")
