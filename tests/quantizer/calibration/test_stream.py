"""Streaming a model layer by layer sees what the whole model sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rrsq.models import ModelSizes, family_for
from rrsq.quantizer.calibration.cache_statistics import balance_keys, collect_cache_means
from rrsq.quantizer.calibration.stream import HiddenStates, collect_inputs
from rrsq.quantizer.fold.rotations import rotate_model
from rrsq.recipe import Rotation
from rrsq.runtime.kv_cache.rope import KeyRotary
from rrsq.runtime.rotation.hadamard import orthonormal
from rrsq.runtime.rotation.rotations import make_rotations
from tiny_quantized import random_tokens

LINEARS = {
    "self_attn.qkv": "self_attn.q_proj",
    "self_attn.o": "self_attn.o_proj",
    "mlp.gate_up": "mlp.gate_proj",
    "mlp.down": "mlp.down_proj",
}
CPU = torch.device("cpu")


@pytest.fixture(params=["tiny_llama_dir", "tiny_qwen2_dir"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def load(folder: Path, attention: str = "sdpa") -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    ).eval()


def stream(model: Any, windows: Tensor, batch_tokens: int = 64) -> HiddenStates:
    return HiddenStates(model, family_for(model.config), windows, CPU, batch_tokens)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_advancing_gives_the_models_own_hidden_states(folder: Path, attention: str) -> None:
    model = load(folder, attention)
    windows = random_tokens(5, 24)
    with torch.inference_mode():
        expected = model(windows, output_hidden_states=True).hidden_states
    hidden = stream(model, windows)
    assert len(hidden.batches) == 3
    torch.testing.assert_close(torch.cat(hidden.batches), expected[0], rtol=0, atol=0)
    for index, layer in enumerate(model.model.layers[:-1]):
        steps: list[int] = []
        first = hidden.advance(layer, lambda steps=steps: steps.append(1))
        assert len(steps) == 3
        torch.testing.assert_close(torch.cat(hidden.batches), expected[index + 1], rtol=1e-5, atol=1e-5)
        assert torch.equal(first, hidden.batches[0])
    hidden.advance(model.model.layers[-1])
    normed = model.model.norm(torch.cat(hidden.batches))
    torch.testing.assert_close(normed, expected[-1], rtol=1e-5, atol=1e-5)


def test_observing_changes_nothing(folder: Path) -> None:
    model = load(folder)
    hidden = stream(model, random_tokens(5, 24))
    before = [batch.clone() for batch in hidden.batches]
    output = hidden.observe(model.model.layers[0])
    assert all(torch.equal(new, old) for new, old in zip(hidden.batches, before, strict=True))
    assert torch.equal(output, hidden.advance(model.model.layers[0]))


def test_hessians_are_those_of_the_whole_model(folder: Path) -> None:
    """``Σ x xᵀ`` of every linear input, from hooks on one forward pass of the Hugging Face model."""
    model = load(folder)
    windows = random_tokens(5, 24)
    family = family_for(model.config)
    seen: dict[tuple[int, str], Tensor] = {}
    handles = []
    for index, layer in enumerate(model.model.layers):
        for name, path in LINEARS.items():
            handles.append(
                layer.get_submodule(path).register_forward_pre_hook(
                    lambda module, args, key=(index, name): seen.__setitem__(key, args[0])
                )
            )
    with torch.inference_mode():
        model(windows)
    for handle in handles:
        handle.remove()
    hidden = stream(model, windows)
    for index, layer in enumerate(model.model.layers):
        with collect_inputs(layer, family.inputs, CPU, with_hessian=True) as statistics:
            hidden.advance(layer)
        for name in LINEARS:
            rows = seen[index, name].double().reshape(-1, seen[index, name].shape[-1]).numpy()
            expected = rows.T @ rows
            assert statistics[name].tokens == 120
            hessian = statistics[name].hessian
            assert hessian is not None
            np.testing.assert_allclose(
                hessian.matrix().numpy(),
                expected,
                rtol=1e-4,
                atol=1e-5 * np.abs(expected).max(),
                err_msg=name,
            )
            np.testing.assert_allclose(
                statistics[name].absmax.numpy(), np.abs(rows).max(0), rtol=1e-4, atol=1e-5
            )


def test_hessians_of_rotated_inputs_are_rotated(folder: Path) -> None:
    """What GPTQ needs behind an online rotation ``R`` is ``Rᵀ H R``."""
    windows = random_tokens(5, 24)
    hessians = []
    for recipe in (None, Rotation(residual=False, head=False)):
        model = load(folder)
        sizes = ModelSizes.from_config(model.config)
        rotations = make_rotations(recipe, sizes, seed=0)
        family = family_for(model.config)
        rotate_model(model, family, rotations, sizes)
        layer = model.model.layers[0]
        with collect_inputs(layer, family.inputs, CPU, with_hessian=True) as statistics:
            stream(model, windows).observe(layer)
        hessians.append(statistics)
    assert rotations.intermediate is not None
    assert rotations.across_heads is not None
    across = torch.kron(orthonormal(rotations.across_heads, torch.float64), torch.eye(16).double())
    for name, R in (
        ("mlp.down", orthonormal(rotations.intermediate, torch.float64)),
        ("self_attn.o", across),
    ):
        plain, rotated = hessians[0][name].hessian, hessians[1][name].hessian
        assert plain is not None
        assert rotated is not None
        expected = R.T @ plain.matrix().double() @ R
        np.testing.assert_allclose(
            rotated.matrix().numpy(), expected.numpy(), rtol=0, atol=1e-5 * float(expected.abs().max())
        )


def test_means_are_those_of_the_projections(folder: Path) -> None:
    model = load(folder)
    hidden = stream(model, random_tokens(5, 24))
    layer = model.model.layers[0]
    rotary = KeyRotary.of(type(model.model.rotary_emb), model.config)
    with collect_cache_means(layer.self_attn, rotary) as means:
        hidden.observe(layer)
    x = layer.input_layernorm(torch.cat(hidden.batches)).reshape(120, -1).double()
    for name, linear in (("key", layer.self_attn.k_proj), ("value", layer.self_attn.v_proj)):
        expected = x.mean(0) @ linear.weight.double().T
        if linear.bias is not None:
            expected = expected + linear.bias.double()
        mean = means[name].mean().flatten().numpy()
        np.testing.assert_allclose(mean, expected.detach().numpy(), rtol=0, atol=1e-5)
    keys = layer.self_attn.k_proj(x.float()).double().view(5, 24, -1)
    np.testing.assert_allclose(means["sink"].mean().flatten(), keys[:, 0].mean(0).detach(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        means["key_square"].mean().flatten(), keys.square().mean((0, 1)).detach(), rtol=1e-4
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_squares_of_queries_are_those_that_rope_keeps(folder: Path, attention: str) -> None:
    model = load(folder, attention)
    hidden = stream(model, random_tokens(5, 24))
    first, second = model.model.layers[:2]
    # Two attentions of one configuration at once: each has its own.
    with (
        collect_cache_means(first.self_attn, None) as means,
        collect_cache_means(second.self_attn, None) as others,
    ):
        output = hidden.observe(first)
        assert not others["query_square"].tokens
    assert model.config._attn_implementation == attention
    assert torch.equal(output, hidden.run(first, hidden.batches[0]))
    queries = first.self_attn.q_proj(first.input_layernorm(torch.cat(hidden.batches))).double()
    kv_heads, head_dim = means["key"].mean().shape
    squares = queries.reshape(5 * 24, kv_heads, -1, head_dim).square().mean((0, 2))
    # RoPE turns the channels of a pair into each other.
    pairs = squares.view(kv_heads, 2, -1).sum(1)
    found = means["query_square"].mean().view(kv_heads, 2, -1).sum(1)
    np.testing.assert_allclose(found, pairs.detach(), rtol=1e-4)


def test_keys_are_balanced_with_queries() -> None:
    rotary = KeyRotary(torch.ones(2))
    spread = torch.tensor([[1.0, 4.0, 1.0, 4.0, 0.0, 9.0]])
    queries = torch.tensor([[16.0, 4.0, 16.0, 4.0, 1.0, 9.0 * 2**-4]])
    mean = torch.full_like(spread, 3.0)
    means = {"key": mean, "key_square": spread + mean.square(), "query_square": queries}
    # D^4 = 16, 1, 16, 1, unknown, 1/16: less the mean of the logarithms, 2^1 2^0 2^1 2^0 - 2^-1.
    assert balance_keys(means, rotary).tolist() == [[2.0, 1.0, 2.0, 1.0, 1.0, 0.5]]
    means["key"] = torch.tensor([[3.0, 3.0, 3.0, 3.0, 3.0, 300.0]])
    means["key_square"] = spread + means["key"].square()
    whole = balance_keys(means, rotary, centred=False)
    assert torch.equal(whole, balance_keys({**means, "key": torch.zeros_like(mean)}, rotary))
    assert whole[0, 5] < balance_keys(means, rotary)[0, 5]
    means["query_square"] = torch.tensor([[24.0, 4.0, 8.0, 4.0, 1.0, 9.0 * 2**-4]])
    assert balance_keys(means, rotary).tolist() == [[2.0, 1.0, 2.0, 1.0, 1.0, 0.5]]


def test_the_hooks_are_gone_afterwards(folder: Path) -> None:
    model = load(folder)
    layer = model.model.layers[0]
    hidden = stream(model, random_tokens(2, 8))
    inputs = family_for(model.config).inputs
    with collect_inputs(layer, inputs, CPU, with_hessian=False) as statistics:
        hidden.observe(layer)
    with pytest.raises(RuntimeError), collect_cache_means(layer.self_attn, None):
        raise RuntimeError
    tokens = statistics["self_attn.qkv"].tokens
    hidden.observe(layer)
    assert statistics["self_attn.qkv"].tokens == tokens
    modules = list(layer.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
