"""Rotations folded into weights leave the logits what they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from rrsq.models import ModelSizes, family_for
from rrsq.quantizer.fold.rotations import rotate_model, untie_head
from rrsq.recipe import Rotation
from rrsq.runtime.modules.rotation import RotatedLinear
from rrsq.runtime.rotation.hadamard import orthonormal
from rrsq.runtime.rotation.rotations import RandomizedHadamard, Rotations, make_rotations
from tiny_quantized import load_tiny, logits_of, random_tokens

NONE = Rotation(residual=False, head=False, across_heads=False, intermediate=False)
ONE_BY_ONE = {
    "residual": NONE.model_copy(update={"residual": True}),
    "head": NONE.model_copy(update={"head": True}),
    "across_heads": NONE.model_copy(update={"across_heads": True}),
    "intermediate": NONE.model_copy(update={"intermediate": True}),
    "intermediate in 2 shards": NONE.model_copy(update={"intermediate": True, "shards": 2}),
    "all": Rotation(),
    "all, 2 shards": Rotation(shards=2),
}


def rotate(model: Any, recipe: Rotation, seed: int = 0) -> Rotations:
    sizes = ModelSizes.from_config(model.config)
    rotations = make_rotations(recipe, sizes, seed)
    rotate_model(model, family_for(model.config), rotations, sizes)
    return rotations


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def random_model(config: Any) -> Any:
    """A float32 model with uneven norm gains and random biases."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.exp(0.5 * torch.randn_like(parameter)))
            elif name.endswith("bias"):
                parameter.copy_(torch.randn_like(parameter))
    return model


def dense(rotation: RandomizedHadamard) -> np.ndarray:
    """``diag(signs) H`` in float64."""
    return np.diag(rotation.signs.numpy()) @ orthonormal(rotation.plan, torch.float64).numpy()


@pytest.mark.parametrize("recipe", ONE_BY_ONE.values(), ids=ONE_BY_ONE)
@pytest.mark.parametrize("family", ["tiny_llama_dir", "tiny_qwen2_dir"])
def test_logits_do_not_change(family: str, recipe: Rotation, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(family)
    tokens = random_tokens(2, 40)
    model = load_tiny(folder)
    before = logits_of(model, tokens)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    rotations = rotate(model, recipe)
    assert any(value is not None for value in rotations.describe().values())
    after = logits_of(model, tokens)
    assert relative(after, before) < 1e-5
    changed = {name.replace(".linear.", "."): p for name, p in model.named_parameters()}
    assert any(not torch.equal(changed[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(
            vocab_size=97,
            hidden_size=60,
            intermediate_size=100,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=3,
            head_dim=20,
            attention_bias=True,
            mlp_bias=True,
            initializer_range=0.1,
        ),
        Qwen2Config(
            vocab_size=97,
            hidden_size=72,
            intermediate_size=88,
            num_hidden_layers=2,
            num_attention_heads=12,
            num_key_value_heads=1,
            head_dim=8,
            initializer_range=0.1,
            tie_word_embeddings=True,
        ),
        LlamaConfig(
            vocab_size=97,
            hidden_size=42,
            intermediate_size=54,
            num_hidden_layers=1,
            num_attention_heads=3,
            num_key_value_heads=3,
            initializer_range=0.1,
        ),
    ],
    ids=["6 heads, biases everywhere", "12 heads of one key head, tied", "odd block sizes"],
)
@pytest.mark.parametrize("shards", [1, 2])
def test_logits_do_not_change_for_awkward_sizes(config: Any, shards: int) -> None:
    model = random_model(config)
    tokens = torch.randint(0, 97, (2, 17), generator=torch.Generator().manual_seed(1))
    before = logits_of(model, tokens)
    rotations = rotate(model, Rotation(shards=shards))
    assert (rotations.across_heads is not None) == (config.num_attention_heads // shards == 12)
    assert relative(logits_of(model, tokens), before) < 1e-5


def test_folded_weights_are_the_dense_products(tiny_llama_dir: Path) -> None:
    """Every weight against ``Rᵀ W R`` written out with dense float64 matrices."""
    original = {name: p.detach().double().numpy() for name, p in load_tiny(tiny_llama_dir).named_parameters()}
    model = load_tiny(tiny_llama_dir)
    rotations = rotate(model, Rotation(), seed=3)
    assert rotations.residual is not None
    assert rotations.head is not None
    assert rotations.across_heads is not None
    assert rotations.intermediate is not None
    R1, R2 = dense(rotations.residual), dense(rotations.head)
    across = np.kron(orthonormal(rotations.across_heads, torch.float64).numpy(), np.eye(16))
    R4 = orthonormal(rotations.intermediate, torch.float64).numpy()
    layer = "model.layers.1."
    qkv_gain = np.diag(original[layer + "input_layernorm.weight"])
    mlp_gain = np.diag(original[layer + "post_attention_layernorm.weight"])
    attention, mlp = layer + "self_attn.", layer + "mlp."
    embedding = original["model.embed_tokens.weight"]
    expected = {
        "model.embed_tokens.weight": embedding @ R1,
        "lm_head.weight": embedding @ np.diag(original["model.norm.weight"]) @ R1,
        attention + "q_proj.weight": original[attention + "q_proj.weight"] @ qkv_gain @ R1,
        attention + "v_proj.weight": np.kron(np.eye(2), R2.T)
        @ original[attention + "v_proj.weight"]
        @ qkv_gain
        @ R1,
        attention + "o_proj.linear.weight": R1.T
        @ original[attention + "o_proj.weight"]
        @ np.kron(np.eye(4), R2)
        @ across,
        mlp + "up_proj.weight": original[mlp + "up_proj.weight"] @ mlp_gain @ R1,
        mlp + "down_proj.linear.weight": R1.T @ original[mlp + "down_proj.weight"] @ R4,
    }
    folded = dict(model.named_parameters())
    for name, value in expected.items():
        np.testing.assert_allclose(folded[name].detach().numpy(), value, atol=2e-6, err_msg=name)
    gains = [p for name, p in folded.items() if "norm" in name]
    assert all(bool((gain == 1).all()) for gain in gains)


def test_the_embedding_is_untied_only_when_it_must_be(tiny_llama_dir: Path) -> None:
    model = load_tiny(tiny_llama_dir)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    rotate(model, ONE_BY_ONE["intermediate"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True
    untie_head(model, family_for(model.config))
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert model.config.tie_word_embeddings is False


def test_shards_are_not_mixed(tiny_qwen2_dir: Path) -> None:
    model = load_tiny(tiny_qwen2_dir)
    rotations = rotate(model, ONE_BY_ONE["intermediate in 2 shards"])
    assert rotations.intermediate is not None
    assert 96 % (2 * rotations.intermediate.block) == 0
    down = model.model.layers[0].mlp.down_proj
    assert isinstance(down, RotatedLinear)
    rotated = down.rotation(torch.eye(96, dtype=torch.float64))
    assert float(rotated[:48, 48:].abs().max()) == 0.0
    assert float(rotated[48:, :48].abs().max()) == 0.0
    torch.testing.assert_close(rotated @ rotated.T, torch.eye(96, dtype=torch.float64))


def test_heads_of_different_shards_are_not_mixed() -> None:
    sizes = ModelSizes(hidden=96, intermediate=160, heads=8, kv_heads=2, head_dim=16, layers=1)
    plan = make_rotations(Rotation(shards=4), sizes, 0).across_heads
    assert plan is not None
    assert (plan.size, plan.block) == (8, 2)
    assert make_rotations(Rotation(shards=8), sizes, 0).across_heads is None


def test_signs_come_from_the_seed() -> None:
    sizes = ModelSizes(hidden=96, intermediate=160, heads=4, kv_heads=2, head_dim=16, layers=1)
    first, again, other = (make_rotations(Rotation(), sizes, seed).residual for seed in (0, 0, 1))
    assert first is not None
    assert again is not None
    assert other is not None
    assert torch.equal(first.signs, again.signs)
    assert not torch.equal(first.signs, other.signs)
    assert set(first.signs.tolist()) == {-1.0, 1.0}


def test_no_recipe_means_no_rotation() -> None:
    sizes = ModelSizes(hidden=96, intermediate=160, heads=4, kv_heads=2, head_dim=16, layers=1)
    assert make_rotations(None, sizes, 0) == Rotations()
    assert make_rotations(NONE, sizes, 0) == Rotations()
