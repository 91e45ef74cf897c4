"""Balancing channels leaves the logits what they were, and makes the rounding error smaller."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rrsq.models import family_for
from rrsq.quantizer.fold.balance import balance_factors, balance_norms, balanced_norms, read_energy
from rrsq.runtime.assemble import open_experts
from tiny_families import TINY, tiny_model
from tiny_quantized import logits_of, random_tokens


def random_factors(channels: int, seed: int) -> Tensor:
    return torch.exp(torch.randn(channels, generator=torch.Generator().manual_seed(seed)))


def balanced(model: Any) -> int:
    """Balance all norms of a model at random; how many there were."""
    family = family_for(model.config)
    count = 0
    for layer in model.get_submodule(family.layers):
        open_experts(layer, family)
        channels = family.sizes(model.config).hidden
        norms = balanced_norms(layer, family)
        factors = {path: random_factors(channels, i + 1) for i, path in enumerate(norms)}
        done = balance_norms(layer, family, factors)
        for path in norms:
            torch.testing.assert_close(done[path], factors[path], rtol=0.01, atol=0)
        count += len(norms)
    return count


@pytest.mark.parametrize("name", TINY)
def test_logits_stay(name: str) -> None:
    model = tiny_model(name)
    tokens = random_tokens(2, 24)
    before = logits_of(model, tokens).double()
    count = balanced(model)
    # These have no norms in front.
    assert (count > 0) == (name not in ("olmo2", "olmo3", "exaone4"))
    after = logits_of(model, tokens).double()
    assert float((after - before).norm() / before.norm()) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
def test_logits_stay_in_half_precision(name: str) -> None:
    """Gains are rounded to bfloat16; the linears are divided by what the gains really became."""
    model = tiny_model(name, torch.bfloat16)
    twin = tiny_model(name, torch.bfloat16).float()
    balanced(model)
    tokens = random_tokens(2, 24)
    before, after = logits_of(twin, tokens).double(), logits_of(model.float(), tokens).double()
    assert float((after - before).norm() / before.norm()) < 0.01  # The rounding of weights to bfloat16.


def test_the_factors_are_the_formula() -> None:
    model = tiny_model("qwen2_moe")
    family = family_for(model.config)
    layer = model.model.layers[0]
    open_experts(layer, family)
    entries = balanced_norms(layer, family)["post_attention_layernorm"]
    energy = torch.rand(56, generator=torch.Generator().manual_seed(0)) + 0.01
    factors = balance_factors(read_energy(layer, entries), energy).double().numpy()
    mlp = layer.mlp
    read = [mlp.experts.gate_up_proj.weight.reshape(-1, 56), mlp.gate.weight, mlp.shared_expert_gate.weight]
    read += [mlp.shared_expert.gate_proj.weight, mlp.shared_expert.up_proj.weight]
    norms = np.square(torch.cat(read).detach().double().numpy()).sum(0)
    expected = (norms / energy.double().numpy()) ** 0.25
    np.testing.assert_allclose(factors, expected / np.exp(np.log(expected).mean()), rtol=1e-5)


def test_dead_channels_are_left_alone() -> None:
    model = tiny_model("llama")
    family = family_for(model.config)
    layer = model.model.layers[0]
    entries = balanced_norms(layer, family)["input_layernorm"]
    energy = torch.ones(60)
    energy[3] = 0.0
    with torch.no_grad():
        layer.input_layernorm.weight[5] = 0.0
    factors = balance_factors(read_energy(layer, entries), energy)
    assert float(factors[3]) == 1.0
    before = layer.self_attn.q_proj.weight.detach().clone()
    done = balance_norms(layer, family, {"input_layernorm": torch.full((60,), 2.0)})["input_layernorm"]
    assert float(done[5]) == 1.0
    assert torch.equal(layer.self_attn.q_proj.weight[:, 5], before[:, 5])
    assert torch.equal(layer.self_attn.q_proj.weight[:, 4], before[:, 4] / 2)


def test_the_product_of_the_errors_becomes_least() -> None:
    """At the formula's factors the product of the energies of input and weight is below its neighbours'."""
    model = tiny_model("llama")
    family = family_for(model.config)
    layer = model.model.layers[0]
    entries = balanced_norms(layer, family)["input_layernorm"]
    energy = torch.rand(60, generator=torch.Generator().manual_seed(0)).double() + 0.01
    attention = layer.self_attn
    weight = (
        torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        .detach()
        .double()
    )

    def product(factors: Tensor) -> float:
        return float((energy * factors.square()).sum() * (weight / factors).square().sum())

    best = balance_factors(read_energy(layer, entries), energy).double()
    for seed in range(20):
        other = best * torch.exp(
            0.1 * torch.randn(60, generator=torch.Generator().manual_seed(seed)).double()
        )
        assert product(best) < product(other)
