"""Caches that users make: rrsq.KVCache, those that cannot hold codes, and iterating over layers."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, StaticCache

import rrsq
from rrsq.errors import UsageError
from rrsq.runtime.decoding import attach_decoder
from rrsq.runtime.kv_cache.layers import QuantizedCacheLayer
from rrsq.runtime.kv_cache.quantizer import KVQuantizer
from rrsq.runtime.kv_cache.static import CodesLayer
from tiny_quantized import load_tiny, logits_of, quantize_tiny, random_tokens, recipe_of


@pytest.fixture(scope="module")
def loaded(tiny_llama_dir: Any) -> Any:
    model = quantize_tiny(tiny_llama_dir, recipe_of("w16a16kv4")).model
    attach_decoder(model)
    return model


@pytest.fixture
def model(loaded: Any) -> Any:
    return copy.deepcopy(loaded)


@pytest.fixture
def codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU what a GPU does, by the operations' references."""
    monkeypatch.setattr(KVQuantizer, "reads_codes", lambda self, device: self._config is not None)


def continued(model: Any, tokens: Tensor, cache: Any) -> Tensor:
    parts = [logits_of(model, tokens[:, :12], past_key_values=cache)]
    for i in range(12, tokens.shape[1]):
        parts.append(logits_of(model, tokens[:, i : i + 1], past_key_values=cache))
    return torch.cat(parts, 1)


@pytest.mark.usefixtures("codes")
def test_a_cache_has_room_for_its_length_from_the_start(model: Any) -> None:
    tokens = random_tokens(2, 16)
    cache = rrsq.KVCache(model, 2000)
    logits = continued(model, tokens, cache)
    assert torch.equal(logits, continued(model, tokens, DynamicCache(config=model.config)))
    assert all(isinstance(layer, CodesLayer) for layer in cache.layers)
    storage = cache.layers[0].storage
    assert storage.capacity == 2048
    assert all(layer.storage is storage for layer in cache.layers)
    cache.reset()
    assert torch.equal(continued(model, tokens, cache), logits)
    assert cache.layers[0].storage is storage


@pytest.mark.usefixtures("codes")
def test_layers_by_themselves_have_room_for_it_too(model: Any) -> None:
    cache = rrsq.KVCache(model, 2000)
    del model.forward
    logits_of(model, random_tokens(1, 5), past_key_values=cache)
    assert [layer.storage.capacity for layer in cache.layers] == [2048] * len(cache.layers)


def test_on_a_cpu_it_is_what_generate_uses(model: Any) -> None:
    tokens = random_tokens(1, 16)
    cache = rrsq.KVCache(model, max_length=32)
    logits = continued(model, tokens, cache)
    assert torch.equal(logits, continued(model, tokens, DynamicCache(config=model.config)))
    assert all(isinstance(layer, QuantizedCacheLayer) for layer in cache.layers)
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    written = model.generate(tokens, past_key_values=rrsq.KVCache(model, 32), **options)
    assert torch.equal(written, model.generate(tokens, **options))


def test_what_no_cache_can_be_made_of(model: Any, tiny_llama_dir: Any) -> None:
    with pytest.raises(UsageError, match="max_length is 0"):
        rrsq.KVCache(model, 0)
    with pytest.raises(UsageError, match="not quantized"):
        rrsq.KVCache(load_tiny(tiny_llama_dir), 8)


def test_a_static_cache_stays_in_16_bits_and_says_so_once(model: Any, tiny_llama_dir: Any) -> None:
    tokens = random_tokens(1, 16)
    cache = StaticCache(config=model.config, max_cache_len=32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logits = continued(model, tokens, cache)
    assert [str(warning.message)[:31] for warning in caught] == ["The KV cache stays in 16 bits: "]
    exact = logits_of(load_tiny(tiny_llama_dir), tokens)
    assert float((logits - exact).norm() / exact.norm()) < 1e-5


def test_a_compiled_forward_pass_says_it_while_it_is_traced(model: Any) -> None:
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    cache = StaticCache(config=model.config, max_cache_len=32)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for _ in range(3):
            compiled(input_ids=random_tokens(1, 4), past_key_values=cache)
    assert sum("stays in 16 bits" in str(warning.message) for warning in caught) == 1


def test_continuous_batching_is_in_16_bits_and_says_so_once(model: Any, tiny_llama_dir: Any) -> None:
    prompts = [random_tokens(length, seed=length).tolist() for length in (12, 20)]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=1)
    implementation = model.config._attn_implementation

    def write(model: Any) -> list[list[int]]:
        # Otherwise it takes nine tenths of the memory that is free.
        room = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
        results = model.generate_batch(
            prompts, generation_config=config, continuous_batching_config=room, progress_bar=False
        )
        return [result.generated_tokens for result in results.values()]

    expected = write(load_tiny(tiny_llama_dir))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        written = [write(model) for _ in range(2)]
    assert written == [expected, expected]
    assert sum("stays in 16 bits" in str(warning.message) for warning in caught) == 1
    assert model.config._attn_implementation == implementation


def test_iterating_gives_keys_and_values(model: Any) -> None:
    tokens = random_tokens(2, 16)
    cache = DynamicCache(config=model.config)
    assert all(layer.keys is None for layer in cache.layers)
    logits_of(model, tokens[:, :15], past_key_values=cache)
    given = [(keys, values) for keys, values, *_ in cache]
    for (keys, values), layer in zip(given, cache.layers, strict=True):
        assert (
            keys.shape
            == values.shape
            == (2, layer.quantizer.keys.kv_heads, 15, layer.quantizer.keys.head_dim)
        )
        assert keys.dtype == torch.float32
    # A cache in 16 bits that is made of them holds the same.
    plain = DynamicCache(given, config=model.config)
    with pytest.warns(UserWarning, match="stays in 16 bits"):
        from_plain = logits_of(model, tokens[:, 15:], past_key_values=plain)
    expected = logits_of(model, tokens[:, 15:], past_key_values=cache)
    assert float((from_plain - expected).norm() / expected.norm()) < 0.1
