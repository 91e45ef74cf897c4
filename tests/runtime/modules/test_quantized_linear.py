"""The quantized linear equals the float simulation of its recipe, token by token."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from test_fused_linears import Calls
from torch import Tensor

from rrsq import kernels
from rrsq.runtime.modules.input import InputQuantizer, InputScheme
from rrsq.runtime.modules.linear import QuantizedLinear
from rrsq.runtime.modules.rotation import OnlineHadamard
from rrsq.runtime.rotation.hadamard import plan_hadamard
from tiny_quantized import logits_of, quantize_tiny, random_tokens, recipe_of

IN, OUT = 96, 40
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
SCHEMES = {
    "W4A16": InputScheme(IN, 16),
    "A4 a token": InputScheme(IN, 4),
    "A4 a token, clipped": InputScheme(IN, 4, clip=0.9),
    "A8 a token": InputScheme(IN, 8),
    "integer 16": InputScheme(IN, 4, clip=0.9333, group_size=16, scales="integer"),
    "integer 32": InputScheme(IN, 4, group_size=32, scales="integer"),
    "token, real scales": InputScheme(IN, 4, group_size=32),
    "block": InputScheme(IN, 4, group_size=32, scope="block"),
    "sequence": InputScheme(IN, 4, group_size=32, scope="sequence"),
    "sequence, normalized": InputScheme(
        IN, 4, group_size=32, scope="sequence", statistic="token_normalized_max"
    ),
    "sequence, stored order": InputScheme(IN, 4, group_size=32, scope="sequence", channel_order="calibrated"),
    "8 bits, stored order": InputScheme(IN, 8, group_size=32, scope="sequence", channel_order="calibrated"),
    "sorted in each call": InputScheme(IN, 4, group_size=32, scope="sequence", channel_order="per_call"),
}


def make_linear(
    scheme: InputScheme, *, group_size: int | None = 32, bias: bool = True, rotated: bool = False
) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(0)
    rotation = OnlineHadamard(plan_hadamard(IN)) if rotated else None
    quantizer = InputQuantizer(scheme, rotation)
    if quantizer.channel_order is not None:
        quantizer.channel_order.copy_(torch.randperm(IN, generator=generator))
    linear = QuantizedLinear(
        IN, OUT, group_size=group_size, bias=bias, input_quantizer=quantizer, dtype=torch.float32
    )
    codes = torch.randint(-8, 8, (OUT, IN), generator=generator)
    multiplier = None
    if group_size is not None:
        multiplier = torch.randint(1, 16, (OUT, IN // group_size), generator=generator).byte()
    linear.set_weight(codes, torch.rand(OUT, generator=generator) * 0.01 + 0.001, multiplier)
    if linear.bias is not None:
        linear.bias.copy_(torch.randn(OUT, generator=generator))
    return linear


def activations(*shape: int) -> Tensor:
    x = torch.randn(*shape, IN, generator=torch.Generator().manual_seed(5))
    x[..., 7] *= 15
    return x


def simulated(linear: QuantizedLinear, x: Tensor) -> np.ndarray:
    """``InputQuantizer.simulate(x) @ dequantized_weight().T + bias`` in float64, in one channel order."""
    value = linear.input_quantizer.simulate(x).double().numpy()
    order = linear.input_quantizer.channel_order
    if order is not None:
        value = value[..., order.numpy()]
    y = value @ linear.dequantized_weight().double().numpy().T
    return y if linear.bias is None else y + linear.bias.double().numpy()


@pytest.mark.parametrize("rotated", [False, True], ids=["", "rotated"])
@pytest.mark.parametrize("group_size", [None, 32], ids=["a row", "groups"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_the_integer_path_equals_the_simulation(
    scheme: InputScheme, group_size: int | None, rotated: bool
) -> None:
    linear = make_linear(scheme, group_size=group_size, rotated=rotated)
    x = activations(2, 67)
    y = linear(x)
    assert y.shape == (2, 67, OUT)
    expected = simulated(linear, x)
    error = np.abs(y.double().numpy() - expected).max(-1)
    assert (error <= 2e-6 * np.abs(expected).max(-1)).all()


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_without_a_bias(scheme: InputScheme) -> None:
    linear = make_linear(scheme, bias=False)
    assert "bias" not in linear.state_dict()
    expected = simulated(linear, activations(5))
    np.testing.assert_allclose(
        linear(activations(5)).numpy(), expected, rtol=0, atol=2e-6 * np.abs(expected).max()
    )


def test_the_dequantized_weight_is_code_times_scale_times_multiplier() -> None:
    linear = make_linear(SCHEMES["A4 a token"])
    assert linear.weight_multiplier is not None
    codes = kernels.unpack_int4(linear.weight_packed).double()
    expected = codes * linear.weight_multiplier.double().repeat_interleave(32, 1)
    expected *= linear.weight_scale.double().unsqueeze(1)
    torch.testing.assert_close(linear.dequantized_weight().double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rotated", [False, True], ids=["", "rotated"])
@pytest.mark.parametrize("name", ["A4 a token", "A8 a token", "integer 16", "token, real scales"])
def test_at_token_scope_a_token_does_not_see_the_rest_of_the_batch(name: str, rotated: bool) -> None:
    linear = make_linear(SCHEMES[name], rotated=rotated)
    x = activations(37)
    together = linear(x)
    x[20:] *= 100
    assert torch.equal(linear(x)[:20], together[:20])
    if not rotated:  # A float rotation of one row and of many may round differently.
        for i in (0, 19):
            assert torch.equal(linear(x[i : i + 1])[0], together[i])


@pytest.mark.parametrize("name", ["sequence", "block"])
def test_wider_scopes_do_see_it(name: str) -> None:
    linear = make_linear(SCHEMES[name])
    x = activations(37)
    together = linear(x)
    x[20:] *= 100
    assert not torch.equal(linear(x)[:20], together[:20])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_keep_float32_scales(dtype: torch.dtype) -> None:
    linear = make_linear(SCHEMES["integer 16"])
    scale, packed = linear.weight_scale.clone(), linear.weight_packed.clone()
    linear.to(dtype)
    assert linear.weight_scale.dtype == torch.float32
    assert torch.equal(linear.weight_scale, scale)
    assert torch.equal(linear.weight_packed, packed)
    assert linear.bias is not None
    assert linear.bias.dtype == dtype
    x = activations(5).to(dtype)
    y = linear(x)
    assert y.dtype == dtype
    expected = simulated(linear, x)
    np.testing.assert_allclose(y.double().numpy(), expected, rtol=0.01, atol=0.01 * np.abs(expected).max())


def test_new_weights_replace_the_unpacked_copy() -> None:
    linear = make_linear(SCHEMES["integer 16"])
    x = activations(3)
    linear(x)
    linear.set_weight(torch.full((OUT, IN), 2), torch.ones(OUT), torch.ones(OUT, 3, dtype=torch.uint8))
    expected = simulated(linear, x)
    np.testing.assert_allclose(linear(x).numpy(), expected, rtol=1e-5, atol=1e-4)


def test_loading_a_state_dict_replaces_the_unpacked_copy() -> None:
    linear, other = make_linear(SCHEMES["integer 16"]), make_linear(SCHEMES["integer 16"])
    other.set_weight(torch.full((OUT, IN), 2), torch.ones(OUT), torch.ones(OUT, 3, dtype=torch.uint8))
    x = activations(3)
    linear(x)
    linear.load_state_dict(other.state_dict())
    assert torch.equal(linear(x), other(x))


def test_a_deep_copy_computes_the_same_and_is_its_own() -> None:
    linear = make_linear(SCHEMES["sequence, stored order"])
    x = activations(3)
    twin = copy.deepcopy(linear)
    assert torch.equal(twin(x), linear(x))
    assert twin.input_quantizer is not linear.input_quantizer


def test_linears_of_one_input_quantize_it_once(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One quantization each for q/k/v, o, gate/up and down: four a layer, in every forward pass."""
    quantized = quantize_tiny(
        tiny_llama_dir, recipe_of("rtn-w4a4", ["activations.smoothing={group_size: 16}"])
    )
    calls = Calls(monkeypatch, "quantize_tokens")
    tokens = random_tokens(2, 5)
    first = logits_of(quantized.model, tokens)
    for _ in range(2):  # Until what runs them is prepared.
        assert torch.equal(logits_of(quantized.model, tokens), first)
    calls.channels.clear()
    assert torch.equal(logits_of(quantized.model, tokens), first)
    assert calls.channels == 3 * [96, 64, 96, 160]
    parent = quantized.model.model.layers[0].self_attn
    quantizers = {id(getattr(parent, name).input_quantizer) for name in ("q_proj", "k_proj", "v_proj")}
    assert quantizers == {id(parent.qkv_input)}


KEPT = {**SCHEMES, "signed": InputScheme(IN, 4, group_size=16, scales="integer", signed=True)}


@needs_triton
@pytest.mark.parametrize(
    "name", ["W4A16", "A8 a token", "integer 16", "token, real scales", "sequence", "signed"]
)
def test_what_is_kept_for_many_tokens_serves_any_number_of_them(name: str) -> None:
    """All numbers above 64 are one size class, of which what runs the first is kept."""
    linear = make_linear(KEPT[name])
    with kernels.use_kernels("triton"):
        for tokens in (70, 70, 90, 66):
            x = activations(tokens)
            with kernels.use_kernels("eager"):
                expected = make_linear(KEPT[name])(x)
            torch.testing.assert_close(linear(x), expected, rtol=1e-3, atol=1e-3)
