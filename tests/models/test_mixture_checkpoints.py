"""Mixtures of experts: from the layout of the Hub, one matrix an expert, to packed experts in one tensor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

import rrsq
from rrsq.quantizer.pipeline import quantize_model
from tiny_families import tiny_model
from tiny_quantized import load_tiny, logits_of, random_tokens, recipe_of, save_tiny

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MIXTURES = {
    "mixtral": "model.layers.0.block_sparse_moe.experts.4.w1.weight",
    "qwen2_moe": "model.layers.2.mlp.experts.5.up_proj.weight",
    "qwen3_moe": "model.layers.1.mlp.experts.6.down_proj.weight",
}
WINDOWS = random_tokens(3, 24, seed=1)
TOKENS = random_tokens(2, 20, seed=2)


def tensors_of(folder: Path) -> dict[str, Any]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


@pytest.fixture
def source(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, request: pytest.FixtureRequest) -> Path:
    """A model folder as the Hub has it: one matrix an expert."""
    folder = tmp_path / "source"
    tiny_model(request.param).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    assert MIXTURES[request.param] in tensors_of(folder)
    return folder


@pytest.mark.parametrize("source", MIXTURES, indirect=True)
def test_from_one_matrix_an_expert_to_packed_experts(source: Path, tmp_path: Path) -> None:
    quantized = quantize_model(load_tiny(source), recipe_of("rrs-w4a4kv4"), WINDOWS)
    out = save_tiny(quantized, source, tmp_path / "out", max_shard_size="40KB")
    assert len(list(out.glob("*.safetensors"))) > 2
    tensors = tensors_of(out)
    packed = {name: tensor for name, tensor in tensors.items() if name.endswith("down_proj.weight_packed")}
    assert {tensor.ndim for name, tensor in packed.items() if ".mlp.experts.down_proj." in name} == {3}
    assert not any(name.endswith(("experts.gate_up_proj", "experts.down_proj")) for name in tensors)
    model = rrsq.load(str(out), device="cpu")
    expected = logits_of(quantized.model, TOKENS)
    assert torch.equal(logits_of(model, TOKENS), expected)

    model.save_pretrained(tmp_path / "again", max_shard_size="30KB")
    again = tensors_of(tmp_path / "again")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    assert torch.equal(logits_of(rrsq.load(str(tmp_path / "again"), device="cpu"), TOKENS), expected)


@pytest.mark.parametrize("source", ["qwen2_moe"], indirect=True)
@pytest.mark.parametrize(
    "overrides",
    [
        "overrides=[{match: '*.experts.down', weights: {bits: 16}, activations: {bits: 16}}]",
        "overrides=[{match: '*.experts.gate_up', activations: {bits: 8}}]",
        "modules_to_not_convert=['*.experts.*', '*.shared_expert.up_proj']",
        "rotation.intermediate=false",
    ],
)
def test_exceptions_among_experts_round_trip(overrides: str, source: Path, tmp_path: Path) -> None:
    recipe = recipe_of("rrs-w4a4kv4", [overrides])
    quantized = quantize_model(load_tiny(source), recipe, WINDOWS)
    model = rrsq.load(str(save_tiny(quantized, source, tmp_path / "out")), device="cpu")
    assert torch.equal(logits_of(model, TOKENS), logits_of(quantized.model, TOKENS))


@pytest.mark.parametrize("source", ["mixtral"], indirect=True)
def test_a_half_precision_mixture_stays_one(source: Path, tmp_path: Path) -> None:
    quantized = quantize_model(load_tiny(source, "bfloat16"), recipe_of("rrs-w4a4kv4"), WINDOWS)
    layer = quantized.model.model.layers[0]
    assert layer.mlp.gate.weight.dtype == torch.bfloat16
    assert layer.mlp.experts.down_proj.weight_scale.dtype == torch.float32
    model = rrsq.load(str(save_tiny(quantized, source, tmp_path / "out")), device="cpu")
    logits = logits_of(model, TOKENS)
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, logits_of(quantized.model, TOKENS))
