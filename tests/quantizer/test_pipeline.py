"""The pipeline: what it needs, what it reports, what it refuses."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from rrsq.errors import NonFiniteError, RecipeError, UnsupportedArchitectureError
from rrsq.quantizer import weights as weights_module
from rrsq.quantizer.memory import weight_bytes
from rrsq.quantizer.pipeline import needs_calibration, quantize_model
from rrsq.recipe import recipe_names
from rrsq.runtime.modules.embedding import Int8Embedding, SharedHead
from rrsq.runtime.modules.linear import QuantizedLinear
from tiny_quantized import load_tiny, logits_of, quantize_tiny, random_tokens, recipe_of

IN_16_BITS = ["embedding.bits=16", "head.bits=16"]


@pytest.mark.parametrize(
    ("name", "overrides", "needed"),
    [
        ("rtn-w4a4", [], False),
        ("gptq-w4a16", [], True),
        ("rrs-w4a4kv4", [], True),
        ("rrs-w4a4kv4", ["weights.method=rtn"], True),
        ("rrs-w4a4kv4", ["weights.method=rtn", "kv_cache.keys.offset=none"], True),
        ("rrs-w4a4kv4", ["weights.method=rtn", "kv_cache.keys={offset: none}"], False),
        ("rrs-w4a4kv4", ["weights.method=rtn", "kv_cache={sensitive_layers: 1}"], True),
        ("rrs-paper-w4a4kv4", ["weights.method=rtn"], True),
        (
            "rrs-paper-w4a4kv4",
            ["weights.method=rtn", "activations.smoothing.channel_order=per_call"],
            False,
        ),
    ],
)
def test_which_recipes_need_calibration(
    name: str, overrides: list[str], needed: bool, tiny_llama_dir: Path
) -> None:
    recipe = recipe_of(name, overrides)
    assert needs_calibration(recipe) == needed
    if needed:
        with pytest.raises(ValueError, match="needs calibration windows"):
            quantize_model(load_tiny(tiny_llama_dir), recipe, None)
    else:
        quantize_model(load_tiny(tiny_llama_dir), recipe, None)


def relative_error(folder: Path, name: str, overrides: list[str]) -> float:
    tokens = random_tokens(4, 48, seed=5)
    exact = logits_of(load_tiny(folder), tokens)
    logits = logits_of(quantize_tiny(folder, recipe_of(name, overrides)).model, tokens)
    return float((logits - exact).norm() / exact.norm())


def test_each_part_of_a_recipe_buys_accuracy(tiny_qwen2_dir: Path) -> None:
    """The order of the recipes on logits of a tiny model: 16-bit, then 8-bit, then 4-bit activations."""
    errors = {
        name: relative_error(tiny_qwen2_dir, name, ["kv_cache=null"])
        for name in ("gptq-w4a16", "rrs-w4a8kv4", "rrs-w4a4kv4", "rtn-w4a4")
    }
    assert errors["rrs-w4a8kv4"] < errors["rrs-w4a4kv4"] < errors["rtn-w4a4"]
    assert errors["gptq-w4a16"] < errors["rrs-w4a4kv4"]


@pytest.mark.parametrize("name", [n for n in recipe_names() if recipe_of(n).weights.bits == 4])
def test_every_linear_is_replaced_and_stays_in_its_place(tiny_llama_dir: Path, name: str) -> None:
    model = quantize_tiny(tiny_llama_dir, recipe_of(name)).model
    for layer in model.model.layers:
        names = [n for n, module in layer.named_modules() if isinstance(module, QuantizedLinear)]
        assert names == [
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        ]
        assert not any(type(module) is torch.nn.Linear for module in layer.modules())
    second = name in ("rrs-w4a4kv4", "rrs-w4a8kv4")
    assert type(model.lm_head) is (SharedHead if second else torch.nn.Linear)
    assert isinstance(model.model.embed_tokens, Int8Embedding) == second


def test_weights_of_16_bits_are_left_as_they_are(tiny_qwen2_dir: Path) -> None:
    original = load_tiny(tiny_qwen2_dir, "bfloat16").state_dict()
    quantized = quantize_tiny(tiny_qwen2_dir, recipe_of("w16a16kv4"), dtype="bfloat16").model.state_dict()
    added = {name for name in quantized if name not in original}
    names = "offset", "sink", "balance"
    assert added == {
        f"model.layers.{i}.self_attn.kv_quantizer.keys.{name}" for i in range(2) for name in names
    }
    assert all(torch.equal(quantized[name], tensor) for name, tensor in original.items())


def test_a_stored_order_is_the_calibrated_order_of_magnitudes(tiny_llama_dir: Path) -> None:
    quantized = quantize_tiny(tiny_llama_dir, recipe_of("rrs-paper-w4a4kv4"))
    for layer in quantized.model.model.layers:
        assert layer.self_attn.qkv_input.channel_order is None
        for quantizer in (layer.self_attn.o_input, layer.mlp.gate_up_input, layer.mlp.down_input):
            order = quantizer.channel_order
            assert order.dtype == torch.int32
            assert sorted(order.tolist()) == list(range(quantizer.scheme.channels))


def test_gptq_follows_the_stored_order(tiny_llama_dir: Path) -> None:
    """A Hessian in another channel order than its weight would make GPTQ worse than rounding."""
    snr = {}
    for method in ("gptq", "rtn"):
        recipe = recipe_of(
            "rrs-paper-w4a4kv4", [f"weights.method={method}", "activations.bits=8", "kv_cache=null"]
        )
        layers = quantize_tiny(tiny_llama_dir, recipe, windows=random_tokens(12, 64)).report.layers
        snr[method] = sum(layer.output_snr_db or 0.0 for layer in layers) / len(layers)
    assert snr["gptq"] > snr["rtn"] + 0.3


def test_a_stored_order_changes_nothing_in_full_precision(tiny_llama_dir: Path) -> None:
    """With 8 bits in one group over all channels, an order can have no effect but on rounding."""
    common = [
        "activations.bits=8",
        "activations.smoothing.group_size=32",
        "activations.smoothing.scope=token",
        "weights.method=rtn",
        "kv_cache=null",
    ]
    tokens = random_tokens(2, 24)
    ordered, plain = (
        logits_of(
            quantize_tiny(
                tiny_llama_dir,
                recipe_of("rrs-paper-w4a4kv4", [*common, f"activations.smoothing.channel_order={order}"]),
                windows=random_tokens(2, 32),
            ).model,
            tokens,
        )
        for order in ("calibrated", "none")
    )
    assert float((ordered - plain).norm() / plain.norm()) < 0.05


def test_the_report_counts_what_happened(tiny_llama_dir: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    model = load_tiny(tiny_llama_dir)
    before = weight_bytes(model)
    quantized = quantize_model(
        model,
        recipe_of("rrs-w4a4kv4"),
        random_tokens(3, 64),
        progress=lambda done, total, text: calls.append((done, total, text)),
    )
    report = quantized.report
    assert [layer.index for layer in report.layers] == [0, 1, 2]
    assert all(layer.output_snr_db is not None and layer.output_snr_db > 3 for layer in report.layers)
    assert all(layer.cache_error is not None and 0 < layer.cache_error < 0.5 for layer in report.layers)
    assert report.fallbacks == []
    assert report.bytes_before == before
    assert report.bytes_after < before
    assert report.peak_memory > 10**7
    assert report.seconds > 0
    assert [done for done, _, _ in calls] == list(range(1, len(calls) + 1))
    assert {total for _, total, _ in calls} == {len(calls)}


def test_packed_weights_take_half_a_byte(tiny_qwen2_dir: Path) -> None:
    model = quantize_tiny(tiny_qwen2_dir, recipe_of("rrs-w4a4kv4")).model
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            assert module.weight_packed.numel() * 2 == module.in_features * module.out_features
            assert not list(module.parameters())


def test_a_layer_whose_hessian_fails_is_rounded_and_reported(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = weights_module.factor_hessian
    seen: list[int] = []

    def failing(hessian: torch.Tensor, **options: Any) -> Any:
        seen.append(hessian.shape[0])
        if len(seen) == 8:  # Inputs are visited in order: the eighth is layer 1's down.
            hessian = hessian * torch.nan
        return original(hessian, **options)

    monkeypatch.setattr(weights_module, "factor_hessian", failing)
    with pytest.warns(UserWarning, match=r"Layer 1, input 'mlp.down': the Hessian could not be factored"):
        quantized = quantize_tiny(tiny_llama_dir, recipe_of("rrs-w4a4kv4"))
    assert seen == 3 * [96, 64, 96, 160]
    assert quantized.report.fallbacks == ["layer 1 mlp.down"]
    assert bool(torch.isfinite(logits_of(quantized.model, random_tokens(1, 8))).all())


def test_nothing_warns_on_an_ordinary_run(tiny_llama_dir: Path) -> None:
    model = load_tiny(tiny_llama_dir)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_model(model, recipe_of("rrs-w4a4kv4"), random_tokens(3, 64))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"]
)
def test_a_weight_that_is_not_finite_is_named(tiny_llama_dir: Path, name: str, value: float) -> None:
    model = load_tiny(tiny_llama_dir)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = value
    with pytest.raises(NonFiniteError, match=f"'{name}' holds NaN or Inf"):
        quantize_model(model, recipe_of("rtn-w4a4"), None)


def test_an_unsupported_architecture_is_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64))
    with pytest.raises(UnsupportedArchitectureError, match=r"'gpt2' is not supported\. Supported: .*llama"):
        quantize_model(model, recipe_of("rtn-w4a4"), None)


@pytest.mark.parametrize("name", ["rrs-w4a4kv4", "rrs-paper-w4a4kv4"])
def test_the_same_seed_gives_the_same_tensors(tiny_qwen2_dir: Path, name: str) -> None:
    first, again, other = (
        quantize_tiny(tiny_qwen2_dir, recipe_of(name), seed=seed).model.state_dict() for seed in (0, 0, 1)
    )
    assert first.keys() == again.keys() == other.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_the_layers_that_a_4_bit_cache_hurts_most_get_8_bit_keys(tiny_llama_dir: Path) -> None:
    recipe = recipe_of("rrs-w4a4kv4", ["kv_cache.sensitive_layers=1"])
    quantized = quantize_tiny(tiny_llama_dir, recipe)
    errors = [layer.cache_error for layer in quantized.report.layers]
    worst = int(np.argmax([error or 0.0 for error in errors]))
    assert quantized.report.sensitive_layers == [worst]
    assert quantized.key_bits == [8 if i == worst else 4 for i in range(3)]
    for index, layer in enumerate(quantized.model.model.layers):
        assert layer.self_attn.kv_quantizer.keys.scheme.bits == quantized.key_bits[index]
        assert layer.self_attn.kv_quantizer.values.scheme.bits == 4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_is_not_quantized_keeps_its_dtype(tiny_qwen2_dir: Path, dtype: str) -> None:
    model = quantize_tiny(tiny_qwen2_dir, recipe_of("rrs-w4a4kv4", IN_16_BITS), dtype=dtype).model
    expected = getattr(torch, dtype)
    assert model.model.embed_tokens.weight.dtype == expected
    assert model.lm_head.weight.dtype == expected
    assert model.model.norm.weight.dtype == expected
    layer = model.model.layers[0]
    assert layer.input_layernorm.weight.dtype == expected
    assert layer.self_attn.q_proj.bias.dtype == expected
    assert layer.self_attn.q_proj.weight_scale.dtype == torch.float32
    assert layer.self_attn.kv_quantizer.keys.offset.dtype == torch.float32
    logits = logits_of(model, random_tokens(1, 8))
    assert logits.dtype == expected
    assert bool(torch.isfinite(logits).all())


def test_key_offsets_are_the_mean_keys_before_rope(tiny_qwen2_dir: Path) -> None:
    """Layer 0 behind an embedding in 16 bits: its offset is the projection of the mean normed embedding."""
    windows = random_tokens(3, 64, seed=1)
    original = load_tiny(tiny_qwen2_dir)
    layer = original.model.layers[0]
    with torch.no_grad():
        x = layer.input_layernorm(original.model.embed_tokens(windows)).double().mean((0, 1))
        expected = x @ layer.self_attn.k_proj.weight.double().T + layer.self_attn.k_proj.bias.double()
    exact = {"windows": windows, "stream_dtype": torch.float32}
    model = quantize_tiny(tiny_qwen2_dir, recipe_of("rrs-w4a4kv4", IN_16_BITS), **exact).model
    offset = model.model.layers[0].self_attn.kv_quantizer.keys.offset
    np.testing.assert_allclose(offset.flatten().numpy(), expected.numpy(), rtol=1e-4, atol=1e-4)


def test_a_layer_is_calibrated_on_quantized_outputs(tiny_llama_dir: Path) -> None:
    """Layer 1's offset of the keys must come from layer 0 as quantized, not from the original."""
    windows = random_tokens(3, 64, seed=1)
    recipe = recipe_of("rrs1-w4a4kv4", ["rotation=null", "activations.clip=0.5"])
    exact = {"windows": windows, "stream_dtype": torch.float32}
    model = quantize_tiny(tiny_llama_dir, recipe, **exact).model
    offset = model.model.layers[1].self_attn.kv_quantizer.keys.offset.flatten()
    original = load_tiny(tiny_llama_dir)
    means = []
    for source in (model, original):
        with torch.inference_mode():
            hidden = source.model(windows, output_hidden_states=True, use_cache=False).hidden_states[1]
            layer = original.model.layers[1]
            means.append(layer.self_attn.k_proj(layer.input_layernorm(hidden)).mean((0, 1)))
    to_quantized, to_original = (float((offset - mean).norm() / mean.norm()) for mean in means)
    assert to_quantized < 1e-4
    assert to_original > 100 * to_quantized


def test_key_offsets_are_refused_where_angles_change_with_length(tiny_qwen2_dir: Path) -> None:
    model = load_tiny(tiny_qwen2_dir)
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": "dynamic"}
    with pytest.raises(RecipeError, match=r"kv_cache\.keys\.offset=none"):
        quantize_model(model, recipe_of("rrs-w4a4kv4", []), random_tokens(1, 8, seed=0))
