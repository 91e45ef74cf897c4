"""A family added from outside the package, by the public registry alone (docs/adding-a-model.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from typer.testing import CliRunner

import rrsq
from rrsq.cli.app import app
from rrsq.errors import UnsupportedArchitectureError
from rrsq.models import register_family, registry
from rrsq.quantizer.fold.rotations import rotate_model
from rrsq.quantizer.pipeline import quantize_model
from rrsq.recipe import Rotation
from rrsq.runtime.kv_cache.layers import QuantizedCacheLayer
from rrsq.runtime.modules.linear import QuantizedLinear
from rrsq.runtime.rotation.rotations import make_rotations
from tiny_quantized import logits_of, random_tokens, recipe_of, save_tiny
from toy_family import TOY, ToyConfig, ToyForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@pytest.fixture
def toy() -> Any:
    """A random model with uneven norm gains; the family is not registered yet."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ToyForCausalLM(ToyConfig()).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.randn_like(parameter) * (1.0 if "norm" in name else 0.3))
    return model


@pytest.fixture
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    register_family(TOY)


def test_it_is_unknown_before(toy: Any) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=r"'toy' is not supported.*adding-a-model\.md"):
        quantize_model(toy, recipe_of("rtn-w4a4"), None)


def test_rotations_change_nothing(toy: Any) -> None:
    tokens = random_tokens(2, 20)
    before = logits_of(toy, tokens).double()
    sizes = TOY.sizes(toy.config)
    rotations = make_rotations(Rotation(), sizes, 0)
    assert None not in (rotations.residual, rotations.head, rotations.across_heads, rotations.intermediate)
    rotate_model(toy, TOY, rotations, sizes)
    after = logits_of(toy, tokens).double()
    assert float((after - before).norm() / before.norm()) < 1e-5


@pytest.mark.usefixtures("_registered")
@pytest.mark.parametrize("name", ["rrs-w4a4kv4", "rrs-paper-w4a4kv4", "rtn-w4a4"])
def test_it_quantizes_saves_loads_and_generates(
    name: str, toy: Any, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    windows = None if name == "rtn-w4a4" else random_tokens(3, 24, seed=1)
    quantized = quantize_model(toy, recipe_of(name), windows)
    block = quantized.model.get_submodule("trunk.blocks.1")
    assert {path for path, module in block.named_modules() if isinstance(module, QuantizedLinear)} == {
        "mixer.fused",
        "mixer.project",
        "grow",
        "shrink",
    }
    model: Any = rrsq.load(str(save_tiny(quantized, tiny_llama_dir, tmp_path / "out")), device="cpu")
    tokens = random_tokens(1, 12)
    assert torch.equal(logits_of(model, tokens), logits_of(quantized.model, tokens))
    result = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        min_new_tokens=5,
        max_new_tokens=5,
        do_sample=False,
        return_dict_in_generate=True,
    )
    assert result.sequences.shape == (1, 17)
    layers = result.past_key_values.layers
    assert all(isinstance(layer, QuantizedCacheLayer) for layer in layers) == (name != "rtn-w4a4")


@pytest.mark.usefixtures("_registered")
def test_the_command_line_quantizes_and_evaluates_it(
    toy: Any, tiny_tokenizer: PreTrainedTokenizerFast, tiny_text_file: Path, tmp_path: Path
) -> None:
    source, out, report = tmp_path / "toy", tmp_path / "out", tmp_path / "report.json"
    toy.save_pretrained(source)
    tiny_tokenizer.save_pretrained(source)
    text = ["--sequence-length", "32"]
    for command in (
        ["quantize", source, "-o", out, "--calibration-data", tiny_text_file, "--num-samples", "4", *text],
        ["eval", source, out, "--tasks", f"text:{tiny_text_file}", "--limit", "2", "--json", report, *text],
        ["generate", out, "the ship", "--max-new-tokens", "2"],
    ):
        result = CliRunner().invoke(app, [str(argument) for argument in command])
        assert result.exit_code == 0, result.output
    models = json.loads(report.read_text(encoding="utf-8"))["models"]
    original, quantized = (model["results"][0]["metrics"][0]["value"] for model in models)
    assert quantized != original
    assert quantized == pytest.approx(original, rel=0.3)
