"""The quantized KV cache of every family: beyond a sliding window, and offsets of keys behind their norms."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from rrsq.quantizer.options import QuantizationOptions
from rrsq.quantizer.pipeline import quantize_model
from rrsq.runtime.kv_cache.layers import QuantizedCacheLayer, QuantizedSlidingLayer
from tiny_families import LONG, TINY, WINDOW, tiny_model
from tiny_quantized import logits_of, random_tokens, recipe_of

LENGTH = 3 * WINDOW
EXACT = QuantizationOptions(stream_dtype=torch.float32)
SLIDING = {
    "mistral": [0, 1],
    "mixtral": [0, 1],
    "qwen2 sliding": [1],
    "phi3": [0, 1],
    "gemma2": [0, 2],
    "gemma3": [0, 1],
    "gemma3_text": [0, 1],
    "olmo3": [0, 1],
    "exaone4": [0, 2],
    "smollm3": [1],
    "starcoder2": [0, 1],
}


def only_cache_quantized(name: str) -> Any:
    windows = random_tokens(3, LENGTH, seed=1)
    # A scale's sign can hang on two entries of about one magnitude, and then a rounding moves a whole group.
    recipe = recipe_of("w16a16kv4", ["kv_cache.keys.signed=false", "kv_cache.values.signed=false"])
    return quantize_model(tiny_model(name), recipe, windows, EXACT).model


def step_by_step(model: Any, tokens: Tensor, cache: DynamicCache, prompt: int) -> Tensor:
    parts = [logits_of(model, tokens[:, :prompt], past_key_values=cache)]
    for i in range(prompt, tokens.shape[1]):
        parts.append(logits_of(model, tokens[:, i : i + 1], past_key_values=cache))
    return torch.cat(parts, 1)


@pytest.mark.parametrize("prompt", [3, WINDOW + 5])
@pytest.mark.parametrize("name", TINY)
def test_decoding_beyond_the_window_equals_one_forward_pass(name: str, prompt: int) -> None:
    model = only_cache_quantized(name)
    tokens = random_tokens(2, LENGTH)
    exact = logits_of(tiny_model(name), tokens)
    expected = logits_of(model, tokens, use_cache=False)
    assert 1e-3 < float((expected - exact).norm() / exact.norm()) < 0.5
    for cache in (DynamicCache(config=model.config), DynamicCache()):
        logits = step_by_step(model, tokens, cache, prompt)
        by_token = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
        # Products of other shapes round otherwise, by the processor: a code of an entry that is between two
        # may move, and all later tokens see it. A key more or less would be far more.
        assert float(by_token.quantile(0.2)) < 1e-5
        assert float(by_token.quantile(0.8)) < 1e-3
        assert float(by_token.max()) < 1e-2
        assert cache.get_seq_length() == LENGTH


@pytest.mark.parametrize("name", TINY)
def test_sliding_layers_hold_no_more_than_the_window(name: str) -> None:
    model = only_cache_quantized(name)
    cache = DynamicCache(config=model.config)
    logits_of(model, random_tokens(1, LENGTH), past_key_values=cache)
    for index, layer in enumerate(cache.layers):
        assert isinstance(layer, QuantizedCacheLayer)
        assert isinstance(layer, QuantizedSlidingLayer) == (index in SLIDING.get(name, []))
        tokens = {tensor.shape[-2] for tensor in layer.stored.values()}
        assert tokens == {WINDOW - 1 if isinstance(layer, QuantizedSlidingLayer) else LENGTH}


def test_a_cache_that_grows_beyond_the_switch_of_longrope() -> None:
    """Keys with a large mean, in 8 bits, against a cache in full precision that grows in the same steps."""
    models = []
    for recipe in (None, recipe_of("w16a16kv4", ["kv_cache.keys.bits=8", "kv_cache.values.bits=8"])):
        model = tiny_model("phi3 longrope")
        with torch.no_grad():
            common = torch.randn(48, generator=torch.Generator().manual_seed(0))
            model.model.embed_tokens.weight += common
        if recipe is not None:
            model = quantize_model(model, recipe, random_tokens(3, LONG + 8, seed=1)).model
        models.append(model)
    tokens = random_tokens(1, LONG + 30)
    plain, quantized = (step_by_step(m, tokens, DynamicCache(config=m.config), LONG - 5) for m in models)
    beyond = slice(LONG, None)
    assert float((quantized - plain)[:, beyond].norm() / plain[:, beyond].norm()) < 0.004


def keys_before_rope(name: str, model: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """``[batch, kv_heads, tokens, head_dim]`` of each layer, from the function that applies RoPE."""
    seen: list[Tensor] = []
    if name == "opt":
        for layer in model.model.decoder.layers:
            layer.self_attn.k_proj.register_forward_hook(
                lambda module, args, out: seen.append(out.unflatten(-1, (5, 12)).transpose(1, 2))
            )
    else:
        module = importlib.import_module(type(model).__module__)
        original = module.apply_rotary_pos_emb

        def spy(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append(k)
            return original(q, k, *args, **kwargs)

        monkeypatch.setattr(module, "apply_rotary_pos_emb", spy)
    logits_of(model, tokens, use_cache=False)
    return seen


@pytest.mark.parametrize("name", TINY)
def test_key_offsets_are_means_of_what_enters_rope(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = random_tokens(3, LENGTH, seed=1)
    model = quantize_model(tiny_model(name), recipe_of("w16a16kv4"), windows, EXACT).model
    attention = [module for module in model.modules() if hasattr(module, "kv_quantizer")]
    offset = attention[0].kv_quantizer.keys.offset
    expected = keys_before_rope(name, tiny_model(name), windows, monkeypatch)[0].double().mean((0, 2))
    torch.testing.assert_close(offset.double(), expected, rtol=1e-4, atol=1e-5)
    # RoPE moves them, so that these would be others.
    assert float(expected.abs().max()) > 0.01


@pytest.mark.parametrize(("name", "norm"), [("smollm3", None), ("exaone4", "k_norm")])
def test_a_layer_without_rope_has_the_means_of_its_keys(name: str, norm: str | None) -> None:
    """Its cache knows no angles, and its neighbours' do."""
    windows = random_tokens(3, LENGTH, seed=1)
    quantized = quantize_model(tiny_model(name), recipe_of("w16a16kv4"), windows, EXACT).model
    attention = [layer.self_attn for layer in quantized.model.layers]
    assert [layer.kv_quantizer.rotary is None for layer in attention] == [False, True, False]
    seen: list[Tensor] = []
    last = attention[1].get_submodule(norm) if norm else attention[1].k_proj
    last.register_forward_hook(lambda module, args, out: seen.append(out))
    logits_of(quantized, windows, use_cache=False)
    keys = seen[0].view(*windows.shape, 2, -1) if norm is None else seen[0].transpose(1, 2)
    expected = keys.double().mean((0, 1))
    offset = attention[1].kv_quantizer.keys.offset.double()
    # Of keys that the layer before, with its cache in 4 bits, moves a little.
    assert float((offset - expected).norm() / expected.norm()) < 0.1
