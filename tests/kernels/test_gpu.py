"""Real sizes on a GPU: every product and quantizer as the dispatch chooses it, graphs, compilation."""

from __future__ import annotations

import pytest
import torch

from rrsq import kernels
from rrsq.runtime.rotation.hadamard import base_matrix, plan_hadamard

from .problems import make_problem, relative_error

pytestmark = pytest.mark.gpu

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (576, 1536), (896, 4864), (1152, 896), (3584, 18944)]


def arguments(problem, dtype=torch.bfloat16):
    return (
        problem.operand,
        problem.scale,
        problem.packed,
        problem.weight_scale,
        problem.multiplier,
        problem.bias,
        dtype,
    )


@pytest.mark.parametrize("tokens", [1, 4, 16, 63, 256, 2049])
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_linear_int8(out_features, in_features, tokens, device):
    problem = make_problem(tokens, out_features, in_features, device=device)
    actual = kernels.linear_int8(*arguments(problem, torch.float32))
    assert relative_error(actual, problem.expected) < 1e-6


@pytest.mark.parametrize("kind", ["zero_rows", "huge_token", "saturated", "signed"])
@pytest.mark.parametrize("tokens", [1, 16, 2048])
def test_linear_int8_adversarial(kind, tokens, device):
    problem = make_problem(tokens, 4096, 18944, kind=kind, device=device)
    actual = kernels.linear_int8(*arguments(problem, torch.float32))
    assert relative_error(actual, problem.expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 4, 16, 63, 256, 2049])
def test_linears_are_the_references_to_the_bit(tokens, dtype, device):
    out_features, in_features = 4096, 14336
    problem = make_problem(tokens, out_features, in_features, device=device)
    x = torch.randn(tokens, in_features, device=device, dtype=dtype)
    x[:, 7] *= 300
    base = base_matrix(plan_hadamard(in_features)).to(device)
    results = []
    for backend in ("triton", "eager"):
        with kernels.use_kernels(backend):
            operand, scale = kernels.quantize_tokens(x, 4, 32, 0.95, base=base, hadamard_block=in_features)
            weight = (problem.packed, problem.weight_scale, problem.multiplier, problem.bias)
            results.append(kernels.linear_int8(operand, scale, *weight, dtype))
    assert torch.equal(*results)


@pytest.mark.parametrize("channels", [576, 1536, 4096, 4864, 8192, 11008, 14336, 18944, 28672])
@pytest.mark.parametrize("tokens", [1, 300])
def test_rotate_and_quantize(channels, tokens, device):
    plan = plan_hadamard(channels)
    assert plan.block == channels
    base = base_matrix(plan).to(device)
    x = torch.randn(tokens, channels, device=device, dtype=torch.bfloat16)
    x[:, 5] *= 100
    options = {"base": base, "hadamard_block": channels}
    operand, scale = kernels.quantize_tokens(x, 4, 32, 0.95, **options)
    with kernels.use_kernels("eager"):
        expected, expected_scale = kernels.quantize_tokens(x, 4, 32, 0.95, **options)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(operand, expected)


@pytest.mark.parametrize("scope", ["token", "block", "sequence"])
def test_smoothed_linear(scope, device):
    problem = make_problem(300, 4096, 4096, device=device)
    x = torch.randn(300, 4096, device=device, dtype=torch.bfloat16)
    results = []
    for backend in ("triton", "eager"):
        with kernels.use_kernels(backend):
            codes, scale, group_scale = kernels.quantize_smoothed(x, 4, 128, scope, "max", 1.0)
            set_size = kernels.tokens_per_set(scope, 300)
            results.append(
                kernels.linear_group_scaled(
                    codes,
                    scale,
                    group_scale,
                    set_size,
                    problem.packed,
                    problem.weight_scale,
                    problem.bias,
                    torch.float32,
                    weight_multiplier=problem.multiplier,
                )
            )
    assert relative_error(results[0], results[1].double()) < 1e-4


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("tokens", [1, 16, 256, 2048])
def test_cuda_graph_replays_follow_their_inputs(tokens, rotated, device):
    problem = make_problem(tokens, 4096, 14336, device=device)
    x = torch.randn(tokens, 14336, device=device, dtype=torch.bfloat16)
    base = base_matrix(plan_hadamard(14336)).to(device)
    rotation = {"base": base, "hadamard_block": 14336} if rotated else {}

    def linear():
        operand, scale = kernels.quantize_tokens(x, 4, 32, 1.0, **rotation)
        return kernels.linear_int8(operand, scale, *arguments(problem)[2:])

    linear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = linear()
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn_like(x))
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, linear())


def test_a_rotation_first_seen_in_a_capture(device):
    x = torch.randn(16, 14336, device=device, dtype=torch.bfloat16)
    warm, cold = (base_matrix(plan_hadamard(14336)).to(device, dtype=torch.int8, copy=True) for _ in range(2))
    expected, _ = kernels.quantize_tokens(x, 4, 32, 1.0, base=warm, hadamard_block=14336)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = kernels.quantize_tokens(x, 4, 32, 1.0, base=cold, hadamard_block=14336)
    for _ in range(2):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, expected)
    assert torch.equal(kernels.quantize_tokens(x, 4, 32, 1.0, base=cold, hadamard_block=14336)[0], expected)


def test_compiled_in_one_graph(device):
    problem = make_problem(16, 512, 1024, device=device)
    x = torch.randn(16, 1024, device=device, dtype=torch.bfloat16)

    def linear(x):
        operand, scale = kernels.quantize_tokens(x * 2, 4, 32, 1.0)
        return kernels.linear_int8(operand, scale, *arguments(problem)[2:]) + 1

    assert torch.equal(torch.compile(linear, fullgraph=True)(x), linear(x))


def test_results_are_deterministic(device):
    problem = make_problem(16, 4096, 14336, device=device)
    first = kernels.linear_int8(*arguments(problem))
    for _ in range(20):
        assert torch.equal(kernels.linear_int8(*arguments(problem)), first)
