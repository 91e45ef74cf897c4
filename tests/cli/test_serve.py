"""``rrsq serve``: what is checked, and what vLLM is started with."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from rrsq.cli.app import app
from rrsq.vllm import launch


def rrsq_serve(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["serve", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM and the plugin seem to be installed."""
    point = importlib.metadata.EntryPoint("rrsq", "rrsq.vllm:register", "vllm.general_plugins")
    monkeypatch.setattr(launch, "version", lambda name: f"{launch.TESTED_VERSION}.3")
    monkeypatch.setattr(launch, "entry_points", lambda group: [point])
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[str, ...], dict[str, str]]]:
    """The programs that this process was to become."""
    calls: list[Any] = []
    monkeypatch.setattr(os, "execvpe", lambda *arguments: calls.append(arguments))
    return calls


def test_vllm_takes_over(qwen2_checkpoint: Path, installed: None, started: list[Any]) -> None:
    result = rrsq_serve(qwen2_checkpoint, "--", "--port", 81, "--max-model-len", 99)
    assert result.exit_code == 0, result.stderr
    ((program, command, environment),) = started
    assert program == sys.executable
    module = "vllm.entrypoints.cli.main"
    options = ["--port", "81", "--max-model-len", "99"]
    assert list(command) == [sys.executable, "-m", module, "serve", str(qwen2_checkpoint), *options]
    assert environment["PATH"] == os.environ["PATH"]
    assert f"vllm serve {qwen2_checkpoint} --port 81" in result.stderr


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_cache_is_chosen(dtype: str, qwen2_checkpoint: Path, installed: None, started: list[Any]) -> None:
    result = rrsq_serve(qwen2_checkpoint, "--kv-cache-dtype", dtype)
    assert result.exit_code == 0, result.stderr
    expected = [] if dtype == "auto" else ["--kv-cache-dtype", dtype]
    assert list(started[0][1])[5:] == expected


def test_an_environment_of_the_users_own_is_kept(
    qwen2_checkpoint: Path, installed: None, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    rrsq_serve(qwen2_checkpoint)
    assert started[0][2]["VLLM_USE_FLASHINFER_SAMPLER"] == "0"
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "1")
    rrsq_serve(qwen2_checkpoint)
    assert started[1][2]["VLLM_USE_FLASHINFER_SAMPLER"] == "1"


def test_a_dry_run_needs_no_vllm(qwen2_checkpoint: Path, started: list[Any]) -> None:
    result = rrsq_serve(qwen2_checkpoint, "--dry-run", "--", "--served-model-name", "a b")
    assert result.exit_code == 0
    assert result.stdout.strip().endswith(f"vllm serve {qwen2_checkpoint} --served-model-name 'a b'")
    assert not started


def test_without_vllm_it_says_how_to_install_it(
    qwen2_checkpoint: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(launch, "version", missing)
    result = rrsq_serve(qwen2_checkpoint)
    assert result.exit_code == 2
    assert "pip install 'rrsq[vllm]'" in result.stderr
    assert not started


def test_a_plugin_that_vllm_would_not_find(
    qwen2_checkpoint: Path, installed: None, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other,another")
    assert "keeps vLLM from loading rrsq" in rrsq_serve(qwen2_checkpoint).stderr
    monkeypatch.delenv("VLLM_PLUGINS")
    monkeypatch.setattr(launch, "entry_points", lambda group: [])
    assert "not installed" in rrsq_serve(qwen2_checkpoint).stderr
    assert not started


def test_a_version_that_was_not_tested(
    qwen2_checkpoint: Path, installed: None, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "version", lambda name: "0.261.0")
    result = rrsq_serve(qwen2_checkpoint)
    assert f"vLLM 0.261.0 is installed; rrsq is tested with {launch.TESTED_VERSION}." in result.stderr
    assert len(started) == 1


def test_more_processes_than_a_rotation_allows(fully_rotated_checkpoint: Path, started: list[Any]) -> None:
    result = rrsq_serve(fully_rotated_checkpoint, "-t", 2)
    assert result.exit_code == 2
    assert "--set rotation.shards=2" in result.stderr
    assert not started


def test_the_number_of_processes_is_handed_on(qwen2_checkpoint: Path) -> None:
    assert launch.plan_launch(str(qwen2_checkpoint), 4).command[-2:] == ("--tensor-parallel-size", "4")


def test_what_is_no_checkpoint(tiny_qwen2_dir: Path, tmp_path: Path) -> None:
    assert "none that rrsq quantized" in rrsq_serve(tiny_qwen2_dir, "--dry-run").stderr
    assert "holds no config.json" in rrsq_serve(tmp_path, "--dry-run").stderr


def test_a_damaged_checkpoint(damaged: Path) -> None:
    (damaged / "model.safetensors").unlink()
    result = rrsq_serve(damaged, "--dry-run")
    assert result.exit_code == 1
    assert "model.safetensors" in result.stderr


def test_another_format_version(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(qwen2_checkpoint, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 77
    (folder / "config.json").write_text(json.dumps(config))
    assert "format version 77" in rrsq_serve(folder, "--dry-run").stderr
