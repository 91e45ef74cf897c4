"""Mixtures of real sizes on a GPU: Mixtral-8x7B and Qwen3-30B-A3B."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rrsq import kernels
from rrsq.kernels import Routing, route_rows
from rrsq.kernels.grouped_linear import float_plan, integer_plan, launch_float, launch_integer
from rrsq.runtime.modules.experts import Experts, QuantizedExpertLinear
from rrsq.runtime.modules.input import InputQuantizer, InputScheme
from rrsq.runtime.modules.rotation import OnlineHadamard
from rrsq.runtime.rotation.hadamard import plan_hadamard

from .problems import relative_error

pytestmark = pytest.mark.gpu

# Experts, output channels, input channels, experts of a token, and whether they read the same token.
SHAPES = {
    "mixtral gate_up": (8, 28672, 4096, 2, True),
    "mixtral down": (8, 4096, 14336, 2, False),
    "qwen3 gate_up": (128, 1536, 2048, 8, True),
    "qwen3 down": (128, 2048, 768, 8, False),
}
# What experts read: integers, 16-bit activations, or codes with real group scales of the whole call.
SCHEMES: dict[str, dict[str, Any]] = {
    "integer": {"bits": 4, "group_size": 16, "scales": "integer"},
    "16 bits": {},
    "smoothed": {"bits": 4, "group_size": 128, "scope": "sequence"},
}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
MIXTURES = {"mixtral": (8, 4096, 14336, 2), "qwen3": (128, 2048, 768, 8)}
TOKENS = [1, 3, 16, 63, 256, 1024, 4096]


def choose(tokens: int, num_experts: int, top_k: int, device: torch.device, seed: int = 0) -> Tensor:
    """Different experts of each token, the first ones more often than the last."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, num_experts, generator=generator) - torch.arange(num_experts) / num_experts
    return scores.topk(top_k, dim=-1).indices.to(device)


def random_weight(
    num_experts: int, out_features: int, in_features: int, device: torch.device, group_size: int = 32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": device, "dtype": torch.uint8}
    return (
        torch.randint(0, 256, (num_experts, out_features, in_features // 2), **options),
        torch.rand(num_experts, out_features, generator=generator, device=device) * 1e-3,
        torch.randint(1, 16, (num_experts, out_features, in_features // group_size), **options),
    )


def product(
    operand: Tensor, scale: Tensor, routing: Routing, rows_per_token: int, weight: tuple[Tensor, ...]
) -> Tensor:
    packed, weight_scale, multiplier = weight
    num_experts, out_features, row_bytes = packed.shape
    rows = routing.experts.shape[0]
    plan = integer_plan(routing.block_rows, min(rows, num_experts), out_features, row_bytes)
    out = torch.full((rows, out_features), float("nan"), device=operand.device)
    launch_integer(plan, operand, scale, routing, rows_per_token, packed, weight_scale, multiplier, out)
    return out


def sampled_products(
    x: Tensor, experts: Tensor, rows_per_token: int, weight: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Some output channels, and what they must be for activations ``x`` float64 ``[tokens, in]``."""
    packed, weight_scale, multiplier = weight
    out_features = packed.shape[1]
    sample = torch.arange(0, out_features, out_features // 15, device=x.device)
    token = torch.arange(len(experts), device=x.device) // rows_per_token
    expected = torch.empty(len(experts), len(sample), dtype=torch.float64, device=x.device)
    for expert in experts.unique().tolist():
        rows = (experts == expert).nonzero().squeeze(1)
        with kernels.use_kernels("eager"):
            matrix = kernels.weight_operand(packed[expert][sample], multiplier[expert][sample]).double()
        expected[rows] = x[token[rows]] @ matrix.T * weight_scale[expert][sample].double()
    return sample, expected


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_against_float64(shape: tuple[int, int, int, int, bool], tokens: int, device: torch.device) -> None:
    """Every element is written, and a sample of channels is what float64 products give."""
    num_experts, out_features, in_features, top_k, shared = shape
    weight = random_weight(num_experts, out_features, in_features, device)
    experts = choose(tokens, num_experts, top_k, device).flatten()
    rows_per_token = top_k if shared else 1
    count = experts.shape[0] // rows_per_token
    generator = torch.Generator(device).manual_seed(1)
    operand = torch.randint(
        -126, 127, (count, in_features), generator=generator, device=device, dtype=torch.int8
    )
    scale = torch.rand(count, generator=generator, device=device) + 0.1
    actual = product(operand, scale, route_rows(experts, num_experts), rows_per_token, weight)
    assert bool(torch.isfinite(actual).all())
    sample, expected = sampled_products(operand.double() * scale[:, None], experts, rows_per_token, weight)
    assert relative_error(actual[:, sample], expected) < 1e-6


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("kind", ["float16", "bfloat16", "smoothed"])
def test_floats_against_float64(
    kind: str,
    group_size: int,
    shape: tuple[int, int, int, int, bool],
    tokens: int,
    device: torch.device,
) -> None:
    """The same for 16-bit activations and for codes with real group scales of eight tokens."""
    num_experts, out_features, in_features, top_k, shared = shape
    weight = random_weight(num_experts, out_features, in_features, device, group_size)
    experts = choose(tokens, num_experts, top_k, device).flatten()
    rows_per_token = top_k if shared else 1
    count = experts.shape[0] // rows_per_token
    generator = torch.Generator(device).manual_seed(1)
    scale = group_scale = None
    if kind == "smoothed":
        operand = torch.randint(
            -7, 8, (count, in_features), generator=generator, device=device, dtype=torch.int8
        )
        scale = torch.rand(count, generator=generator, device=device) + 0.1
        size = (-(-count // 8), in_features // 128)
        group_scale = torch.rand(size, generator=generator, device=device) + 0.1
        each = group_scale.double().repeat_interleave(8, 0)[:count].repeat_interleave(128, 1)
        x = operand.double() * scale[:, None] * each
    else:
        operand = torch.randn(count, in_features, generator=generator, device=device).to(getattr(torch, kind))
        x = operand.double()
    routing = route_rows(experts, num_experts)
    likely = min(len(experts), num_experts)
    step = None if group_scale is None else 128
    plan = float_plan(routing.block_rows, likely, out_features, in_features // 2, step)
    actual = torch.full((len(experts), out_features), float("nan"), device=device)
    arguments = (operand, scale, group_scale, 8, routing, rows_per_token, *weight)
    launch_float(plan, *arguments, actual)
    assert bool(torch.isfinite(actual).all())
    sample, expected = sampled_products(x, experts, rows_per_token, weight)
    # The tensor cores keep fewer bits than float32 of a sum of 16-bit products.
    assert relative_error(actual[:, sample], expected) < (1e-5 if kind == "smoothed" else 1e-4)
    again = torch.full_like(actual, float("nan"))
    launch_float(plan, *arguments, again)
    assert torch.equal(again, actual)


@pytest.mark.parametrize("tokens", [1, 16, 300])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_results_are_deterministic(
    shape: tuple[int, int, int, int, bool], tokens: int, device: torch.device
) -> None:
    num_experts, out_features, in_features, top_k, _ = shape
    weight = random_weight(num_experts, out_features, in_features, device)
    experts = choose(tokens, num_experts, top_k, device).flatten()
    operand = torch.randint(-126, 127, (len(experts), in_features), device=device, dtype=torch.int8)
    scale = torch.ones(len(experts), device=device)
    first = product(operand, scale, route_rows(experts, num_experts), 1, weight)
    for _ in range(10):
        assert torch.equal(product(operand, scale, route_rows(experts, num_experts), 1, weight), first)


def quantized_experts(name: str, device: torch.device, scheme: str = "integer") -> Experts:
    num_experts, hidden, inner, _ = MIXTURES[name]
    linears = []
    for in_features, out_features, rotation in (
        (hidden, 2 * inner, None),
        (inner, hidden, OnlineHadamard(plan_hadamard(inner))),
    ):
        quantizer = InputQuantizer(InputScheme(in_features, **SCHEMES[scheme]), rotation)
        linear = QuantizedExpertLinear(
            num_experts, in_features, out_features, group_size=32, input_quantizer=quantizer
        ).to(device)
        packed, scale, multiplier = random_weight(num_experts, out_features, in_features, device)
        linear.load_state_dict(
            {"weight_packed": packed, "weight_scale": scale, "weight_multiplier": multiplier}
        )
        linears.append(linear)
    return Experts(linears[0], linears[1], nn.SiLU(), num_experts)


def inputs(name: str, tokens: int, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    num_experts, hidden, _, top_k = MIXTURES[name]
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator, device=device).to(torch.bfloat16)
    index = choose(tokens, num_experts, top_k, device, seed)
    weights = torch.rand(tokens, top_k, generator=generator, device=device)
    return x, index, weights


@pytest.mark.parametrize("tokens", [1, 16, 300])
@pytest.mark.parametrize("name", MIXTURES)
@every_scheme
def test_the_mixture_equals_the_loop_over_experts(
    scheme: str, name: str, tokens: int, device: torch.device
) -> None:
    experts = quantized_experts(name, device, scheme)
    arguments = inputs(name, tokens, device)
    actual = experts(*arguments)
    with kernels.use_kernels("eager"):
        expected = experts(*arguments)
    # Rotations and rounding differ in the last digits, so that some codes of the second input do.
    assert float((actual - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("tokens", [1, 16, 300])
@pytest.mark.parametrize("name", MIXTURES)
@every_scheme
def test_nothing_waits_for_the_device(scheme: str, name: str, tokens: int, device: torch.device) -> None:
    experts = quantized_experts(name, device, scheme)
    arguments = inputs(name, tokens, device)
    experts(*arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        experts(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tokens", [1, 16, 300])
@pytest.mark.parametrize("name", MIXTURES)
@every_scheme
def test_cuda_graph_replays_follow_their_inputs(
    scheme: str, name: str, tokens: int, device: torch.device
) -> None:
    experts = quantized_experts(name, device, scheme)
    static = inputs(name, tokens, device)
    experts(*static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = experts(*static)
    for seed in range(1, 4):
        for buffer, new in zip(static, inputs(name, tokens, device, seed), strict=True):
            buffer.copy_(new)
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, experts(*static))


def test_compiled_in_one_graph(device: torch.device) -> None:
    experts = quantized_experts("qwen3", device)
    arguments = inputs("qwen3", 16, device)
    compiled = torch.compile(experts, fullgraph=True)(*arguments)
    expected = experts(*arguments)
    # The compiler keeps the activation function in float32, which changes codes of the second product.
    assert float((compiled - expected).norm() / expected.norm()) < 0.05
