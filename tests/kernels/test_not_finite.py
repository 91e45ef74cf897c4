"""A NaN or an infinity in an activation comes out as NaN from every kernel, and touches no other token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rrsq import kernels
from rrsq.kernels.linear_int8 import launch
from rrsq.kernels.plans import FusedPlan, GemvPlan, TwoPassPlan

from .problems import hadamard_12, make_problem, needs_triton

VALUES = [math.nan, -math.nan, math.inf, -math.inf]
every_value = pytest.mark.parametrize("value", VALUES, ids=["nan", "-nan", "inf", "-inf"])
every_backend = pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=needs_triton)])
# numpy, which the interpreter computes with, warns of what is meant here.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TOKENS, BAD = 4, 2
OTHERS = [token for token in range(TOKENS) if token != BAD]


def spoilt(x: Tensor, value: float, token: int = BAD, channel: int = 37) -> Tensor:
    x = x.clone()
    x[token, channel] = value
    return x


def all_nan(x: Tensor) -> bool:
    return bool(x.isnan().all())


ROTATED = {
    # channels, base, block, inner
    "none": (256, None, 0, 1),
    "beyond one piece": (16640, None, 0, 1),
    "full": (192, "paley", 192, 1),
    "block-diagonal": (384, "paley", 192, 1),
    "across heads": (192, "paley", 12, 16),
    "dense factor in steps": (11008, "large", 11008, 1),
}


def base_of(name: str | None) -> Tensor | None:
    if name == "large":
        from rrsq.runtime.rotation.hadamard import base_matrix, plan_hadamard

        return base_matrix(plan_hadamard(11008))
    return None if name is None else hadamard_12()


@every_value
@every_backend
@pytest.mark.parametrize("rotation", ROTATED)
@pytest.mark.parametrize(("bits", "group_size"), [(4, 16), (4, None), (8, None)])
def test_quantize_tokens(bits, group_size, rotation, backend, value, device, generator):
    channels, base, block, inner = ROTATED[rotation]
    base = base_of(base)
    rotating = (None if base is None else base.to(device), block, inner)
    x = torch.randn(TOKENS, channels, generator=generator).to(device, torch.bfloat16)
    with kernels.use_kernels(backend):
        expected = kernels.quantize_tokens(x, bits, group_size, 0.9, *rotating)
        operand, scale = kernels.quantize_tokens(spoilt(x, value), bits, group_size, 0.9, *rotating)
    assert all_nan(scale[BAD])
    assert torch.equal(scale[OTHERS], expected[1][OTHERS])
    assert torch.equal(operand[OTHERS], expected[0][OTHERS])


@every_value
@every_backend
@pytest.mark.parametrize("statistic", ["max", "token_normalized_max"])
@pytest.mark.parametrize(("scope", "tokens"), [("token", 4), ("sequence", 4), ("block", 132)])
@pytest.mark.parametrize("rotated", [False, True])
def test_smoothed_linear(rotated, scope, tokens, statistic, backend, value, device, generator):
    """All tokens that share a scale with the bad one are NaN, no others."""
    problem = make_problem(tokens, 24, 128, device=device)
    x = torch.randn(tokens, 128, generator=generator).to(device, torch.bfloat16)
    rotation = {"base": torch.ones(1, 1, device=device), "hadamard_block": 128} if rotated else {}
    set_size = kernels.tokens_per_set(scope, tokens)
    in_the_set = torch.arange(tokens) // set_size == BAD // set_size

    def linear(x: Tensor) -> Tensor:
        codes, scale, group_scale = kernels.quantize_smoothed(x, 4, 32, scope, statistic, 0.9, **rotation)
        weight = (problem.packed, problem.weight_scale, problem.bias, torch.float32, problem.multiplier)
        return kernels.linear_group_scaled(codes, scale, group_scale, set_size, *weight)

    with kernels.use_kernels(backend):
        y, expected = linear(spoilt(x, value)), linear(x)
    assert all_nan(y[in_the_set])
    assert torch.equal(y[~in_the_set], expected[~in_the_set])


@every_value
@every_backend
@pytest.mark.parametrize("group_size", [16, None])
def test_linear(group_size, backend, value, device, generator):
    problem = make_problem(TOKENS, 24, 256, device=device)
    x = torch.randn(TOKENS, 256, generator=generator).to(device, torch.bfloat16)

    def linear(x: Tensor) -> Tensor:
        operand, scale = kernels.quantize_tokens(x, 4, group_size, 1.0)
        weight = (problem.packed, problem.weight_scale, problem.multiplier, problem.bias)
        return kernels.linear_int8(operand, scale, *weight, torch.bfloat16)

    with kernels.use_kernels(backend):
        y, expected = linear(spoilt(x, value)), linear(x)
    assert all_nan(y[BAD])
    assert torch.equal(y[OTHERS], expected[OTHERS])


PLANS = [
    GemvPlan(8, 2),
    FusedPlan(16, 32, 64, 1, 4, 2),
    FusedPlan(16, 64, 64, 3, 4, 2),
    TwoPassPlan(32, 32, 64, 4, 4, 2, False),
    TwoPassPlan(32, 32, 64, 4, 4, 2, True),
]


@needs_triton
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.kind)
def test_every_plan_carries_a_scale_of_nan(plan, device):
    tokens = 1 if isinstance(plan, GemvPlan) else TOKENS
    problem = make_problem(tokens, 24, 256, device=device)
    problem.operand[-1] = 0
    problem.scale[-1] = math.nan
    out = torch.zeros(tokens, 24, device=device)
    weight = (problem.packed, problem.weight_scale, problem.multiplier, problem.bias)
    launch(problem.operand, problem.scale, *weight, out.dtype, plan=plan, out=out)
    assert all_nan(out[-1])
    assert bool(out[:-1].isfinite().all())


@every_value
@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_linears_with_floating_activations(bits, dtype, backend, value, device, generator):
    """In floating point an infinity gives infinities."""
    problem = make_problem(TOKENS, 24, 256, device=device)
    x = torch.randn(TOKENS, 256, generator=generator).to(device, dtype)
    if bits == 8:
        codes = torch.randint(1, 128, (24, 256), generator=generator, dtype=torch.int8).to(device)
        operation, weight = kernels.linear_w8a16, (codes, problem.weight_scale, problem.bias)
    else:
        operation = kernels.linear_w4a16
        weight = (problem.packed, problem.weight_scale, problem.multiplier, problem.bias)
    with kernels.use_kernels(backend):
        y, expected = operation(spoilt(x, value), *weight), operation(x, *weight)
    assert not bool(y[BAD].isfinite().any())
    assert not math.isnan(value) or all_nan(y[BAD])
    assert torch.equal(y[OTHERS], expected[OTHERS])


@every_value
@every_backend
@pytest.mark.parametrize("kind", ["integers", "real scales", "16 bits"])
@pytest.mark.parametrize("tokens", [3, 40])
def test_grouped_linear(tokens, kind, backend, value, device, generator):
    """Rows by themselves and in sorted blocks."""
    codes = torch.randint(0, 256, (4, 24, 64), generator=generator, dtype=torch.uint8).to(device)
    weight_scale = torch.rand(4, 24, generator=generator).to(device) + 0.1
    multiplier = torch.randint(1, 16, (4, 24, 4), generator=generator, dtype=torch.uint8).to(device)
    experts = torch.randint(0, 4, (tokens,), generator=generator).to(device)
    x = torch.randn(tokens, 128, generator=generator).to(device, torch.float16)

    def experts_of(x: Tensor) -> Tensor:
        if kind == "integers":
            operand = (*kernels.quantize_tokens(x, 4, 16, 1.0), None)
        elif kind == "real scales":
            operand = kernels.quantize_smoothed(x, 4, 128, "token", "max", 1.0)
        else:
            operand = (x, None, None)
        routing = kernels.route_rows(experts, 4, 1 if tokens < 16 else 16)
        weight = (codes, weight_scale, multiplier, torch.float32)
        return kernels.grouped_linear(*operand, 1, *routing, 1, *weight)

    with kernels.use_kernels(backend):
        y, expected = experts_of(spoilt(x, value)), experts_of(x)
    others = torch.arange(tokens) != BAD
    assert not bool(y[BAD].isfinite().any())
    assert (kind == "16 bits" and math.isinf(value)) or all_nan(y[BAD])
    assert torch.equal(y[others], expected[others])


@every_value
@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hadamard_transform(dtype, backend, value, device, generator):
    """What the bad value is mixed with is not finite; here that is the whole token."""
    x = torch.randn(TOKENS, 192, generator=generator).to(device, dtype)
    base = hadamard_12().to(device)
    with kernels.use_kernels(backend):
        y = kernels.hadamard_transform(spoilt(x, value), base, 192)
        expected = kernels.hadamard_transform(x, base, 192)
    assert not bool(y[BAD].isfinite().any())
    assert torch.equal(y[OTHERS], expected[OTHERS])


@every_backend
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gptq_block(backend, value, device, generator):
    """GPTQ looks at the errors, which tell of a weight that is not finite."""
    block = torch.randn(16, 20, generator=generator)
    steps = torch.full((16, 20), 0.3)
    upper = (torch.randn(16, 16, generator=generator) * 0.1).triu() + torch.eye(16)
    block[5, 7] = value
    with kernels.use_kernels(backend):
        _, errors = kernels.gptq_block(block.to(device), steps.to(device), upper.to(device))
    bad = torch.arange(20) == 7
    assert not bool(errors[5:, bad].isfinite().any())
    assert bool(errors[:, ~bad].isfinite().all())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_point", [False, True])
def test_cached_keys(zero_point, bits, generator):
    """NaN spoils its group of a stored key or value."""
    x = spoilt(torch.randn(TOKENS, 64, generator=generator), math.nan)
    decoded = kernels.decode_cache(*kernels.encode_cache(x, bits, 32, zero_point), bits)
    assert all_nan(decoded[BAD, 32:])
    assert bool(decoded[BAD, :32].isfinite().all())
    assert bool(decoded[OTHERS].isfinite().all())


@pytest.mark.gpu
@every_value
@pytest.mark.parametrize("channels", [4096, 14336, 11008])
@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_real_sizes(tokens, channels, value, device):
    """Every plan that the tables choose, rotated and not."""
    from rrsq.runtime.rotation.hadamard import base_matrix, plan_hadamard

    problem = make_problem(tokens, 4096, channels, device=device)
    plan = plan_hadamard(channels)
    x = torch.randn(tokens, channels, device=device, dtype=torch.bfloat16)
    for rotation in ((), (base_matrix(plan).to(device), plan.block)):
        y = []
        for given in (spoilt(x, value, tokens - 1, channels - 5), x):
            operand, scale = kernels.quantize_tokens(given, 4, 16, 0.95, *rotation)
            weight = (problem.packed, problem.weight_scale, problem.multiplier, problem.bias)
            y.append(kernels.linear_int8(operand, scale, *weight, torch.bfloat16))
        assert all_nan(y[0][-1])
        assert torch.equal(y[0][:-1], y[1][:-1])
        assert bool(y[1].isfinite().all())


@pytest.mark.gpu
@every_value
@pytest.mark.parametrize("scope", ["token", "block", "sequence"])
def test_real_sizes_with_real_scales(scope, value, device):
    x = torch.randn(300, 4096, device=device, dtype=torch.bfloat16)
    _, scale, _ = kernels.quantize_smoothed(spoilt(x, value, 299), 4, 128, scope, "max", 1.0)
    size = kernels.tokens_per_set(scope, 300)
    in_the_set = (torch.arange(300) // size == 299 // size).to(device)
    assert torch.equal(scale.isnan(), in_the_set)
