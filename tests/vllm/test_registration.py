"""How vLLM comes to know the plugin, and that other models do not notice it."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import tomllib
from fake_vllm import REASON, engine_config, has_vllm, prepare
from servable import llama

import rrsq.vllm
from rrsq.models import families
from tiny_families import random_model

if TYPE_CHECKING:
    from conftest import Make

ROOT = Path(__file__).parents[2]
needs_vllm = pytest.mark.skipif(not has_vllm(), reason=REASON)


def test_the_entry_point_names_register() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    point = importlib.metadata.EntryPoint(
        "rrsq", project["entry-points"]["vllm.general_plugins"]["rrsq"], "vllm.general_plugins"
    )
    assert point.load() is rrsq.vllm.register


@needs_vllm
def test_the_installed_version_is_one_that_is_asked_for() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        (requirement,) = tomllib.load(file)["project"]["optional-dependencies"]["vllm"]
    from packaging.requirements import Requirement

    assert importlib.metadata.version("vllm") in Requirement(requirement).specifier


@needs_vllm
def test_a_checkpoint_is_recognized_by_its_configuration(make: Make) -> None:
    config = engine_config(make("llama", llama()))
    assert config.model_config.quantization == "rrsq"
    assert type(config.quant_config).__name__ == "RRSQConfig"
    assert config.model_config.hf_config.architectures == ["RRSQLlamaForCausalLM"]


@needs_vllm
def test_registering_again_changes_nothing() -> None:
    prepare()
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.model_executor.models import ModelRegistry

    before = list(QUANTIZATION_METHODS), list(ModelRegistry.models)
    rrsq.vllm.register()
    assert (list(QUANTIZATION_METHODS), list(ModelRegistry.models)) == before
    assert QUANTIZATION_METHODS.count("rrsq") == 1


@needs_vllm
def test_a_release_that_the_plugin_does_not_fit_serves_other_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rrsq.vllm.config", None)
    with pytest.warns(UserWarning, match=r"does not fit vLLM 0\.26.*cannot be served"):
        rrsq.vllm.register()


@needs_vllm
@pytest.mark.parametrize(
    "architecture", sorted({family.architecture for family in families() if family.served})
)
def test_vllm_has_a_model_for_every_family(architecture: str) -> None:
    prepare()
    from vllm.model_executor.models import ModelRegistry

    assert f"RRSQ{architecture}" in ModelRegistry.models


@needs_vllm
def test_other_models_are_vllms_own(tmp_path: Path) -> None:
    random_model(llama()).save_pretrained(tmp_path)
    config = engine_config(tmp_path)
    assert config.quant_config is None
    assert config.model_config.hf_config.architectures == ["LlamaForCausalLM"]
