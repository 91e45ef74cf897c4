"""Quantized heads, modules left in full precision, and other bits by pattern."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import rrsq
from rrsq.errors import RecipeError
from rrsq.kernels.quantize_signed import rotate_blocks
from rrsq.quantizer.pipeline import needs_calibration, quantize_model
from rrsq.runtime.modules.int8_linear import Int8Linear
from rrsq.runtime.modules.linear import QuantizedLinear
from rrsq.runtime.modules.rotation import RotatedLinear
from tiny_families import tiny_model
from tiny_quantized import load_tiny, logits_of, quantize_tiny, random_tokens, recipe_of, save_tiny


def folded(folder: Path) -> Any:
    """The rotated model before anything is quantized: a recipe whose pattern spares every linear."""
    recipe = recipe_of("rrs1-w4a4kv4", ["kv_cache=null", "modules_to_not_convert=['*']"])
    return quantize_tiny(folder, recipe).model


def error(model: Any, reference: torch.Tensor, tokens: torch.Tensor) -> float:
    return float((logits_of(model, tokens) - reference).norm() / reference.norm())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["tiny_llama_dir", "tiny_qwen2_dir"])
def test_a_quantized_head_is_within_its_rounding(
    family: str, bits: int, request: pytest.FixtureRequest
) -> None:
    """Everything else in full precision: logits change by what the head's rounding explains, and not less."""
    folder: Path = request.getfixturevalue(family)
    tokens = random_tokens(2, 20)
    exact = logits_of(load_tiny(folder), tokens)
    recipe = recipe_of("w16a16kv4", ["kv_cache=null", f"head.bits={bits}", "weights.group_size=null"])
    model = quantize_tiny(folder, recipe).model
    assert isinstance(model.lm_head, Int8Linear if bits == 8 else QuantizedLinear)
    assert isinstance(model.model.layers[0].mlp.down_proj, torch.nn.Linear)
    bound = {8: 0.008, 4: 0.15}[bits]
    assert bound / 20 < error(model, exact, tokens) < bound


def test_an_8_bit_head_rounds_each_row_to_nearest() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40000, 6, generator=generator) * torch.rand(40000, 1, generator=generator) * 10
    weight[7] = 0
    head = Int8Linear(6, 40000, bias=True, dtype=torch.float32)
    head.set_weight(weight)
    head.bias.copy_(torch.randn(40000, generator=generator))
    x = torch.randn(2, 3, 6, generator=generator)
    step = weight.double().abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    rounded = (weight.double() / step).round() * step
    expected = x.double() @ rounded.T + head.bias.double()
    torch.testing.assert_close(head(x).double(), expected, rtol=1e-5, atol=1e-4)
    half = head.to(torch.bfloat16)
    assert half.weight_scale.dtype == torch.float32
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_gptq_helps_a_4_bit_head(tiny_qwen2_dir: Path) -> None:
    tokens = random_tokens(6, 64, seed=1)
    exact = logits_of(load_tiny(tiny_qwen2_dir), tokens)
    errors = {}
    for method in ("gptq", "rtn"):
        options = ["kv_cache=null", "head.bits=4", f"weights.method={method}", "weights.group_size=null"]
        recipe = recipe_of("w16a16kv4", options)
        assert needs_calibration(recipe) == (method == "gptq")
        errors[method] = error(quantize_tiny(tiny_qwen2_dir, recipe, windows=tokens).model, exact, tokens)
    assert errors["gptq"] < 0.97 * errors["rtn"]


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_head_round_trips(name: str, bits: int, tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Untied, folded, behind soft-capping, and with the bias that a LayerNorm leaves."""
    recipe = recipe_of("rrs1-w4a4kv4", [f"head.bits={bits}"])
    original = tiny_model(name)
    quantized = quantize_model(original, recipe, random_tokens(3, 24))
    assert (quantized.model.lm_head.bias is not None) == (name == "opt")
    model = rrsq.load(str(save_tiny(quantized, tiny_llama_dir, tmp_path / "out")), device="cpu")
    tokens = random_tokens(1, 12)
    assert torch.equal(logits_of(model, tokens), logits_of(quantized.model, tokens))
    generated = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), min_new_tokens=3, max_new_tokens=3
    )
    assert generated.shape == (1, 15)


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
def test_all_modules_kept_is_the_model_itself(name: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Everything is rotated and nothing quantized, so the logits are the model's, also when loaded."""
    recipe = recipe_of("rrs-w4a4kv4", ["kv_cache=null", "modules_to_not_convert=['*']", "head.bits=4"])
    tokens = random_tokens(2, 16)
    exact = logits_of(tiny_model(name), tokens)
    quantized = quantize_model(tiny_model(name), recipe, random_tokens(2, 16, seed=1))
    assert not any(isinstance(module, QuantizedLinear) for module in quantized.model.modules())
    assert any(isinstance(module, RotatedLinear) for module in quantized.model.modules())
    assert error(quantized.model, exact, tokens) < 1e-5
    model = rrsq.load(str(save_tiny(quantized, tiny_llama_dir, tmp_path / "out")), device="cpu")
    assert torch.equal(logits_of(model, tokens), logits_of(quantized.model, tokens))


def test_kept_modules_stay_and_the_others_share_their_input(tiny_llama_dir: Path, tmp_path: Path) -> None:
    patterns = ["*.k_proj", "model.layers.1.mlp.*", "*.0.mlp.down_proj"]
    recipe = recipe_of("rrs1-w4a4kv4", [f"modules_to_not_convert={patterns}"])
    quantized = quantize_tiny(tiny_llama_dir, recipe)
    reference = folded(tiny_llama_dir).state_dict()
    layers = quantized.model.model.layers
    for index, layer in enumerate(layers):
        kept = {name for name, m in layer.named_modules() if type(m) in (torch.nn.Linear, RotatedLinear)}
        expected = {"self_attn.k_proj"}
        if index == 1:
            expected |= {"mlp.gate_proj", "mlp.up_proj"}
        if index in (0, 1):
            expected |= {"mlp.down_proj", "mlp.down_proj.linear"}
        assert kept == expected
        assert layer.self_attn.qkv_fused.names == ("q_proj", "v_proj")
        assert hasattr(layer.mlp, "gate_up_fused") == (index != 1)
        assert hasattr(layer.mlp, "gate_up_input") == (index != 1)
        assert hasattr(layer.mlp, "down_input") == (index == 2)
    state = quantized.model.state_dict()
    for name in ("layers.0.self_attn.k_proj.weight", "layers.1.mlp.down_proj.linear.weight"):
        assert torch.equal(state[f"model.{name}"], reference[f"model.{name}"])
    out = save_tiny(quantized, tiny_llama_dir, tmp_path / "out")
    tokens = random_tokens(2, 12)
    assert torch.equal(
        logits_of(rrsq.load(str(out), device="cpu"), tokens), logits_of(quantized.model, tokens)
    )


def test_overrides_change_what_they_match(tiny_llama_dir: Path, tmp_path: Path) -> None:
    overrides = (
        'overrides=[{match: "*.mlp.down", activations: {bits: 8}},'
        '{match: "model.layers.0.*", weights: {group_size: 8, method: rtn}},'
        '{match: "*.2.self_attn.qkv", weights: {bits: 16}, activations: {bits: 16}},'
        '{match: "model.layers.1.mlp.down", activations: {bits: 4, clip: 0.5}}]'
    )
    quantized = quantize_tiny(tiny_llama_dir, recipe_of("rrs1-w4a4kv4", [overrides]))
    layers = quantized.model.model.layers
    assert [layer.mlp.down_input.scheme.bits for layer in layers] == [8, 4, 8]
    assert [layer.mlp.down_input.scheme.clip for layer in layers] == [1.0, 0.5, 1.0]
    assert {layer.mlp.gate_up_input.scheme.bits for layer in layers} == {4}
    assert [layer.mlp.up_proj.group_size for layer in layers] == [8, 32, 32]
    assert type(layers[2].self_attn.v_proj) is torch.nn.Linear
    assert isinstance(layers[1].self_attn.v_proj, QuantizedLinear)
    model: Any = rrsq.load(str(save_tiny(quantized, tiny_llama_dir, tmp_path / "out")), device="cpu")
    tokens = random_tokens(2, 12)
    assert torch.equal(logits_of(model, tokens), logits_of(quantized.model, tokens))


def test_in_blocks_an_input_with_one_scale_a_token_needs_no_signed_levels(tiny_llama_dir: Path) -> None:
    """They are rotated by the same kernel; only the recipe need not say so."""
    overrides = ['overrides=[{match: "*.mlp.down", activations: {bits: 8}}]', "weights.method=rtn"]
    layers = quantize_tiny(tiny_llama_dir, recipe_of("rrs-w4a4kv4", overrides)).model.model.layers
    down = layers[0].mlp.down_input
    assert (down.scheme.bits, down.scheme.group_size, down.scheme.signed) == (8, None, True)
    x = torch.randn(2, down.scheme.channels)
    assert float((down.simulate(x) - rotate_blocks(x, 16)).abs().max()) < 0.02 * float(x.abs().max())


def test_8_bits_where_it_matters_cost_less_than_4_everywhere(tiny_qwen2_dir: Path) -> None:
    tokens = random_tokens(4, 48, seed=5)
    exact = logits_of(load_tiny(tiny_qwen2_dir), tokens)
    errors = []
    for overrides in ([], ['overrides=[{match: "*", activations: {bits: 8}}]']):
        recipe = recipe_of("rrs-w4a4kv4", ["kv_cache=null", "weights.method=rtn", *overrides])
        errors.append(error(quantize_tiny(tiny_qwen2_dir, recipe).model, exact, tokens))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "modules_to_not_convert=['*.k_prj']",
            r"modules_to_not_convert matches nothing.*N\.self_attn\.k_proj.*lm_head",
        ),
        (
            "overrides=[{match: '*.dwn', activations: {bits: 8}}]",
            r"overrides matches nothing.*layers\.N\.mlp\.down;",
        ),
        ("overrides=[{match: '*.down_proj', activations: {bits: 8}}]", r"mlp\.down"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(setting: str, message: str, tiny_llama_dir: Path) -> None:
    recipe = recipe_of("rtn-w4a4", [setting])
    with pytest.raises(RecipeError, match=message):
        quantize_model(load_tiny(tiny_llama_dir), recipe, None)


def test_a_folded_r1_is_refused_where_other_modules_write_to_the_stream(tiny_llama_dir: Path) -> None:
    model = load_tiny(tiny_llama_dir)
    model.model.vision_tower = torch.nn.Linear(4, 4)
    with pytest.raises(RecipeError, match=r"model\.vision_tower.*rotation\.residual=false"):
        quantize_model(model, recipe_of("rrs1-w4a4kv4", ["weights.method=rtn", "kv_cache=null"]), None)
    settings = ["weights.method=rtn", "kv_cache=null", "rotation.residual=false"]
    quantized: Any = quantize_model(model, recipe_of("rrs1-w4a4kv4", settings), None).model
    assert type(quantized.model.vision_tower) is torch.nn.Linear


def test_an_odd_number_of_input_channels_is_refused_unless_it_is_kept(tiny_llama_dir: Path) -> None:
    config: Any = load_tiny(tiny_llama_dir).config
    config.intermediate_size = 33
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(RecipeError, match=r"mlp\.down' has 33 channels.*\(down_proj\).*to_not_convert"):
        quantize_model(model, recipe_of("rtn-w4a4", []), None)
    kept = recipe_of("rtn-w4a4", ["modules_to_not_convert=['*.down_proj']"])
    quantized: Any = quantize_model(model, kept, None).model
    assert type(quantized.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert isinstance(quantized.model.layers[0].mlp.up_proj, QuantizedLinear)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("head.bits=3", r"head\.bits"),
        ("embedding.bits=3", r"embedding\.bits"),
        ("embedding.blocks=3", r"embedding\.blocks"),
        ("embedding.group_size=1", r"embedding\.group_size"),
        ("embedding.method=gptq", "unknown key 'embedding.method'"),
        ("overrides=[{match: '*.down'}]", "overrides nothing"),
        ("overrides=[{activations: {bits: 8}}]", r"overrides\.0\.match"),
        ("overrides=[{match: '*', activation: {bits: 8}}]", "unknown key 'overrides.0.activation'"),
        ("overrides=[{match: '*', weights: {bits: 16}}]", r"needs activations: \{bits: 16\}"),
        ("overrides=[{match: '*', activations: {bits: 8, smoothing: {}}}]", "scales: integer needs"),
    ],
)
def test_an_impossible_exception_is_refused(setting: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_of("rrs-w4a4kv4", [setting])
