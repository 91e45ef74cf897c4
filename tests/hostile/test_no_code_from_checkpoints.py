"""No code of a checkpoint is run, and nothing is unpickled, unless it is asked for by name."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import rrsq
from hostile.folders import CANARY, Evil
from rrsq.cli.app import app
from rrsq.errors import CheckpointError, ModelLoadError, RRSQError
from rrsq.runtime.format.loading import load_config, load_tokenizer

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
import pathlib
pathlib.Path({canary!r}).mkdir()
class EvilConfig(LlamaConfig):
    model_type = "evil"
class Evil(LlamaForCausalLM):
    config_class = EvilConfig
"""

TEMPLATES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "self": "{{ self._TemplateReference__context }}",
    "cycler": "{{ cycler.__init__.__globals__.os.mkdir('canary') }}",
    "lipsum": "{{ lipsum.__globals__['os'].mkdir('canary') }}",
    "attr": "{{ (''|attr('__class__'))|attr('__mro__') }}{{ raise_exception('the end') }}",
    "namespace": "{% set n = namespace(__class__=1) %}{{ n.__class__.__base__ }}",
    "import": "{% import 'os' as os %}{{ os.mkdir('canary') }}",
    "include": "{% include '/etc/passwd' %}",
    "mutation": "{{ messages.append(1) }}",
    "format": "{{ '{0.__class__.__mro__}'.format('') }}{{ raise_exception('the end') }}",
    "long-loop": "{% for i in range(1000000000) %}x{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "division": "{{ 1 / 0 }}",
    "syntax": "{% for %}",
    "nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
}


@pytest.fixture
def model_folder(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A copy of a model, to be changed."""
    return shutil.copytree(tiny_llama_dir, tmp_path / "model")


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would ask at the terminal whether to run code, and wait."""

    def refuse(*args: Any) -> str:
        raise AssertionError("a question was asked")

    monkeypatch.setattr(builtins, "input", refuse)


def with_code(folder: Path) -> Path:
    """Make it a model of a type that only its own code knows. Returns what the code makes."""
    canary = folder.parent / CANARY
    (folder / "evil.py").write_text(CODE.format(canary=str(canary)))
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": auto_map}))
    return canary


def test_code_is_not_run(model_folder: Path) -> None:
    canary = with_code(model_folder)
    for load in (rrsq.load, load_config):
        with pytest.raises(RRSQError) as caught:
            load(str(model_folder))
        assert "\n" not in str(caught.value)
    load_tokenizer(str(model_folder))
    assert not canary.exists()


def test_code_is_run_where_it_is_asked_for_by_name(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(model_folder.parent / "cache")
    )
    canary = with_code(model_folder)
    assert type(rrsq.load(str(model_folder), device="cpu", trust_remote_code=True)).__name__ == "Evil"
    assert canary.exists()


def test_pickled_weights_are_refused(model_folder: Path) -> None:
    (model_folder / "model.safetensors").unlink()
    torch.save({"x": Evil(model_folder)}, model_folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"There is pytorch_model\.bin, but a pickle may run code"):
        rrsq.load(str(model_folder), device="cpu")
    assert not (model_folder.parent / CANARY).exists()


def test_pickled_weights_are_read_where_they_are_asked_for_by_name(model_folder: Path) -> None:
    weights = load_file(model_folder / "model.safetensors")
    (model_folder / "model.safetensors").unlink()
    torch.save(weights, model_folder / "pytorch_model.bin")
    model = rrsq.load(str(model_folder), device="cpu", use_safetensors=False)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(model.get_parameter(name), weights[name])
    # Not even then is an object made of what a pickle says.
    torch.save({**weights, "x": Evil(model_folder)}, model_folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError):
        rrsq.load(str(model_folder), device="cpu", use_safetensors=False)
    assert not (model_folder.parent / CANARY).exists()


def test_a_tensor_that_is_missing_is_not_made_up(model_folder: Path) -> None:
    """transformers would fill it with random numbers and warn."""
    from safetensors.torch import save_file

    weights = load_file(model_folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"lacks the tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        rrsq.load(str(model_folder), device="cpu")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_cannot_get_out(
    name: str, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model_folder / "chat_template.jinja").write_text(TEMPLATES[name])
    monkeypatch.chdir(model_folder.parent)
    result = CliRunner().invoke(app, ["generate", str(model_folder), "x", "--chat", "--max-new-tokens", "1"])
    assert result.exit_code in (1, 2)
    assert result.stderr.count("Error: ") == 1
    assert "chat template" in result.stderr
    assert "mro" not in result.stdout
    assert not (model_folder.parent / CANARY).exists()


def test_a_chat_template_that_works_still_does(model_folder: Path) -> None:
    (model_folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    result = CliRunner().invoke(app, ["generate", str(model_folder), "x", "--chat", "--max-new-tokens", "1"])
    assert result.exit_code == 0


def test_an_error_names_the_file(model_folder: Path) -> None:
    (model_folder / "config.json").write_bytes(b"{")
    with pytest.raises(CheckpointError, match=r"config\.json is damaged: it is not valid JSON"):
        load_config(str(model_folder))
