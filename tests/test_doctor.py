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
from typer.testing import CliRunner

from rrsq import doctor
from rrsq.cli.app import app
from rrsq.doctor import Finding, examine


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
