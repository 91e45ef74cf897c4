"""The quantized mixture of experts equals the float simulation of its recipe, row by row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, Qwen2MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

from rrsq.runtime.modules.experts import ExpertLinear, Experts, QuantizedExpertLinear
from rrsq.runtime.modules.input import InputQuantizer, InputScheme
from rrsq.runtime.modules.rotation import OnlineHadamard, RotatedLinear
from rrsq.runtime.rotation.hadamard import plan_hadamard

EXPERTS, HIDDEN, INNER, TOP_K = 5, 48, 40, 2
SCHEMES: dict[str, dict[str, Any]] = {
    "W4A16": {"bits": 16},
    "A4 a token": {"bits": 4},
    "A8 a token": {"bits": 8},
    "integer 16": {"bits": 4, "group_size": 16, "scales": "integer"},
    "token, real scales": {"bits": 4, "group_size": 8},
    "block": {"bits": 4, "group_size": 8, "scope": "block"},
    "sequence": {"bits": 4, "group_size": 8, "scope": "sequence"},
    "sequence, stored order": {
        "bits": 4,
        "group_size": 8,
        "scope": "sequence",
        "channel_order": "calibrated",
    },
    "sorted in each call": {"bits": 4, "group_size": 8, "scope": "sequence", "channel_order": "per_call"},
}


def random_linear(
    in_features: int, out_features: int, scheme: dict[str, Any], rotation: OnlineHadamard | None, seed: int
) -> QuantizedExpertLinear:
    generator = torch.Generator().manual_seed(seed)
    quantizer = InputQuantizer(InputScheme(in_features, **scheme), rotation)
    if quantizer.channel_order is not None:
        quantizer.channel_order.copy_(torch.randperm(in_features, generator=generator))
    linear = QuantizedExpertLinear(
        EXPERTS, in_features, out_features, group_size=8, input_quantizer=quantizer
    )
    for expert in range(EXPERTS):
        linear.set_weight(
            torch.randint(-8, 8, (out_features, in_features), generator=generator),
            torch.rand(out_features, generator=generator) * 0.01 + 0.001,
            torch.randint(1, 16, (out_features, in_features // 8), generator=generator).byte(),
            (expert,),
        )
    return linear


def random_experts(scheme: dict[str, Any]) -> Experts:
    rotation = OnlineHadamard(plan_hadamard(INNER))
    gate_up = random_linear(HIDDEN, 2 * INNER, scheme, None, 0)
    return Experts(gate_up, random_linear(INNER, HIDDEN, scheme, rotation, 1), nn.SiLU(), EXPERTS)


def routed(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Activations, two different experts of each token, and their weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    x[:, 7] *= 15
    probabilities = torch.rand(tokens, EXPERTS, generator=generator)
    weights, index = probabilities.topk(TOP_K, dim=-1)
    return x, index, weights


def multiply(linear: Any, x: Tensor, expert: int) -> np.ndarray:
    """One row, in float64: simulated input times dequantized weight, in one channel order."""
    order = linear.input_quantizer.channel_order
    row = x.double().numpy()
    return linear.dequantized_weight()[expert].double().numpy() @ (row if order is None else row[order])


def simulated(experts: Any, x: Tensor, index: Tensor, weights: Tensor) -> np.ndarray:
    """The mixture by its definition, one row at a time."""
    inputs = experts.gate_up_proj.input_quantizer.simulate(x)
    rows = [(token, slot) for token in range(len(x)) for slot in range(TOP_K)]
    inner = []
    for token, slot in rows:
        both = multiply(experts.gate_up_proj, inputs[token], int(index[token, slot]))
        gate, up = both[:INNER], both[INNER:]
        inner.append(gate / (1 + np.exp(-gate)) * up)
    middle = experts.down_proj.input_quantizer.simulate(torch.from_numpy(np.stack(inner)).float())
    y = np.zeros((len(x), HIDDEN))
    for row, (token, slot) in enumerate(rows):
        part = multiply(experts.down_proj, middle[row], int(index[token, slot]))
        y[token] += float(weights[token, slot]) * part
    return y


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_the_integer_path_equals_the_simulation(scheme: dict[str, Any]) -> None:
    experts = random_experts(scheme)
    arguments = routed(70)
    y = experts(*arguments).double().numpy()
    expected = simulated(experts, *arguments)
    error = np.abs(y - expected).max(-1) / np.abs(expected).max(-1)
    # The activation's last digits may move a code of the second input, in few rows.
    assert np.median(error) < 2e-6
    assert error.max() < 0.05


@pytest.mark.parametrize("scheme", ["A4 a token", "integer 16", "token, real scales"])
def test_tokens_do_not_depend_on_each_other(scheme: str) -> None:
    experts = random_experts(SCHEMES[scheme])
    x, index, weights = routed(12)
    together = experts(x, index, weights)
    alone = torch.cat([experts(x[i : i + 1], index[i : i + 1], weights[i : i + 1]) for i in range(12)])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


def test_a_token_is_quantized_once_whatever_its_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = random_experts(SCHEMES["integer 16"])
    seen: list[tuple[int, ...]] = []
    original = InputQuantizer.forward

    def counting(self: InputQuantizer, x: Tensor) -> Any:
        seen.append(tuple(x.shape))
        return original(self, x)

    monkeypatch.setattr(InputQuantizer, "forward", counting)
    experts(*routed(9))
    assert seen == [(9, HIDDEN), (9 * TOP_K, INNER)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_leaves_scales_in_float32(dtype: torch.dtype) -> None:
    experts = random_experts(SCHEMES["A8 a token"])
    x, index, weights = routed(20)
    exact = experts(x, index, weights)
    experts.to(dtype)
    assert experts.gate_up_proj.weight_scale.dtype == torch.float32
    y = experts(x.to(dtype), index, weights)
    assert y.dtype == dtype
    assert float((y.float() - exact).norm() / exact.norm()) < 0.02


def test_new_weights_replace_the_unpacked_copy() -> None:
    experts = random_experts(SCHEMES["A8 a token"])
    arguments = routed(20)
    before = experts(*arguments)
    other = random_experts(SCHEMES["A8 a token"])
    for linear in (other.gate_up_proj, other.down_proj):
        linear.weight_scale.mul_(2)
    experts.load_state_dict(other.state_dict())
    assert torch.equal(experts(*arguments), other(*arguments))
    codes = torch.zeros(HIDDEN, INNER)
    for expert in range(EXPERTS):
        experts.down_proj.set_weight(codes, torch.ones(HIDDEN), None, (expert,))
    assert float(experts(*arguments).abs().max()) == 0.0
    assert float(before.abs().max()) > 0.0


def test_compiled_in_one_graph() -> None:
    experts = random_experts(SCHEMES["integer 16"])
    arguments = routed(20)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), experts(*arguments))


def theirs(kind: str) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "num_experts_per_tok": TOP_K}
    if kind == "mixtral":
        config = MixtralConfig(**sizes, intermediate_size=INNER, num_local_experts=EXPERTS)
        module: Any = MixtralExperts(config)
    else:
        module = Qwen2MoeExperts(Qwen2MoeConfig(**sizes, moe_intermediate_size=INNER, num_experts=EXPERTS))
    module.config._experts_implementation = "eager"
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module.requires_grad_(False)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_in_full_precision_it_is_the_module_of_transformers(kind: str) -> None:
    module = theirs(kind)
    experts = Experts.of(module)
    assert experts.gate_up_proj.weight is module.gate_up_proj
    arguments = routed(33)
    torch.testing.assert_close(experts(*arguments), module(*arguments), rtol=1e-5, atol=1e-5)


def test_the_inputs_of_one_expert_are_those_of_its_linears() -> None:
    experts = Experts.of(theirs("mixtral"))
    rotation = OnlineHadamard(plan_hadamard(INNER))
    down: Any = experts.down_proj
    assert isinstance(down, ExpertLinear)
    experts.down_proj = RotatedLinear(rotation, down)
    seen: list[Tensor] = []
    down.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = routed(6)[0]
    experts(x, torch.full((6, 1), 3), torch.ones(6, 1))
    torch.testing.assert_close(experts.input_of_down(x, 3), seen[0])
    gate, up = (x @ experts.gate_up_proj.weight[3].T).chunk(2, dim=-1)
    dense = torch.eye(INNER) @ rotation(torch.eye(INNER))
    torch.testing.assert_close(seen[0], nn.functional.silu(gate) * up @ dense, rtol=1e-4, atol=1e-4)
    assert torch.equal(experts.input_of_gate_up(x), x)
