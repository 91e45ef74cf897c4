"""The cache that attention reads as codes: every way in which generate() and others use it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from rrsq.runtime.decoding import _Pool, attach_decoder
from rrsq.runtime.kv_cache import static
from rrsq.runtime.kv_cache.layers import QuantizedCacheLayer
from rrsq.runtime.kv_cache.quantizer import KVQuantizer
from rrsq.runtime.kv_cache.static import CodesLayer, Storage, enough
from tiny_families import tiny_model
from tiny_quantized import logits_of, quantize_tiny, random_tokens, recipe_of

EXACT_LINEARS = [
    "activations.smoothing=null",
    "activations.bits=16",
    "weights.group_size=2",
    "weights.method=rtn",
]


@pytest.fixture(scope="module", params=["tiny_llama_dir", "tiny_qwen2_dir", "gemma2", "gemma3_text"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    recipe = recipe_of("rrs1-w4a4kv4", EXACT_LINEARS)
    if request.param.startswith("gemma"):
        folder = tmp_path_factory.mktemp(request.param)
        tiny_model(request.param).save_pretrained(folder)
    else:
        folder = request.getfixturevalue(request.param)
    quantized = quantize_tiny(folder, recipe).model
    attach_decoder(quantized)
    return quantized


@pytest.fixture(autouse=True)
def _codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU too, where the operations' references attend to the codes; sliding layers hold 24 tokens."""
    monkeypatch.setattr(KVQuantizer, "reads_codes", lambda self, device: self._config is not None)
    monkeypatch.setattr(static, "BEYOND_WINDOW", 16)
    monkeypatch.setattr(static, "_STEP", 8)


def assert_near(value: Tensor, reference: Tensor, tolerance: float = 0.02) -> None:
    """Codes next to a rounding boundary, and float16 in place of float32, make a small difference."""
    assert float((value - reference).norm() / reference.norm()) < tolerance


def step_by_step(model: Any, tokens: Tensor, prompt: int, cache: Any, **options: Any) -> Tensor:
    parts = [logits_of(model, tokens[:, :prompt], past_key_values=cache, **options)]
    for i in range(prompt, tokens.shape[1]):
        parts.append(logits_of(model, tokens[:, i : i + 1], past_key_values=cache))
    return torch.cat(parts, 1)


def generate(model: Any, tokens: Tensor, **options: Any) -> Any:
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **options}
    mask = options.pop("mask", torch.ones_like(tokens))
    return model.generate(tokens, attention_mask=mask, return_dict_in_generate=True, **options)


@pytest.mark.parametrize("prompt", [3, 20])
def test_decoding_is_that_of_the_layers_that_give_keys_back(
    model: Any, prompt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = random_tokens(2, 26)
    cache = DynamicCache(config=model.config)
    logits = step_by_step(model, tokens, prompt, cache)
    assert all(isinstance(layer, CodesLayer) for layer in cache.layers)
    assert cache.get_seq_length() == 26
    assert_near(logits_of(model, tokens, use_cache=False), logits)
    monkeypatch.setattr(KVQuantizer, "reads_codes", lambda self, device: False)
    reference = DynamicCache(config=model.config)
    expected = step_by_step(model, tokens, prompt, reference)
    assert all(isinstance(layer, QuantizedCacheLayer) for layer in reference.layers)
    assert_near(logits, expected)


def test_several_tokens_after_a_prompt(model: Any) -> None:
    tokens = random_tokens(2, 50)
    cache = DynamicCache(config=model.config)
    parts = [
        logits_of(model, tokens[:, a:b], past_key_values=cache)
        for a, b in ((0, 5), (5, 9), (9, 40), (40, 50))
    ]
    assert_near(torch.cat(parts, 1), logits_of(model, tokens, use_cache=False))


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}, {"max_new_tokens": 9}]
)
def test_generate_writes_what_it_writes_without_a_cache(model: Any, options: dict[str, Any]) -> None:
    tokens = random_tokens(2, 12)
    result = generate(model, tokens, **options)
    assert all(isinstance(layer, CodesLayer) for layer in result.past_key_values.layers)
    options.pop("cache_implementation", None)
    assert torch.equal(result.sequences, generate(model, tokens, use_cache=False, **options).sequences)


def test_left_padding_changes_nothing(model: Any) -> None:
    tokens = random_tokens(1, 12)
    padding = torch.full((1, 5), model.config.get_text_config().pad_token_id or 0)
    mask = torch.cat((torch.zeros_like(padding), torch.ones_like(tokens)), 1)
    alone = generate(model, tokens, output_logits=True)
    shifted = generate(model, torch.cat((padding, tokens), 1), mask=mask, output_logits=True)
    assert torch.equal(alone.sequences, shifted.sequences[:, 5:])
    for a, b in zip(alone.logits, shifted.logits, strict=True):
        assert_near(b, a)


def test_assisted_decoding(model: Any) -> None:
    tokens = random_tokens(1, 12)
    alone = generate(model, tokens)
    assisted = generate(model, tokens, prompt_lookup_num_tokens=3)
    assert torch.equal(alone.sequences, assisted.sequences)


def test_a_prompt_is_reused(model: Any) -> None:
    tokens = random_tokens(1, 30)
    cache = DynamicCache(config=model.config)
    logits_of(model, tokens[:, :20], past_key_values=cache)
    copied = copy.deepcopy(cache)
    first = generate(model, tokens[:, :24], past_key_values=copied)
    second = generate(model, tokens[:, :24], past_key_values=cache)
    assert torch.equal(first.sequences, second.sequences)
    assert torch.equal(first.sequences, generate(model, tokens[:, :24]).sequences)


def test_growing_beyond_the_first_storage(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = random_tokens(3, 24)
    expected = step_by_step(model, tokens, 4, DynamicCache(config=model.config))
    monkeypatch.setattr("rrsq.runtime.decoding.enough", lambda tokens: tokens + 3)
    monkeypatch.setattr(model.forward, "_pool", _Pool())
    cache = DynamicCache(config=model.config)
    assert_near(step_by_step(model, tokens, 4, cache), expected, 1e-5)
    assert cache.layers[0].storage.capacity < 30


def test_a_storage_is_used_again_by_the_next_cache(model: Any) -> None:
    def storage_of(batch: int) -> int:
        cache = DynamicCache(config=model.config)
        logits_of(model, random_tokens(batch, 5), past_key_values=cache)
        assert len({id(layer.storage) for layer in cache.layers}) == 1
        return id(cache.layers[0].storage)

    first = storage_of(2)
    assert storage_of(2) == first
    assert storage_of(1) != first


def test_no_more_storage_is_kept_than_is_cheap(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, device = _Pool(), torch.device("cpu")
    quantizers = model.forward.quantizers
    windows = (None,) * len(quantizers)
    storages = [Storage(quantizers, windows, 1, capacity, device) for capacity in (8, 16, 32)]
    for storage in storages:
        pool.give_back(storage)
    assert pool.take(quantizers, windows, 1, 8, device) is storages[1]
    monkeypatch.setattr("rrsq.runtime.decoding._FREE_BYTES", storages[2].nbytes)
    pool.give_back(storages[0])
    assert pool.take(quantizers, windows, 1, 8, device) is storages[0]
    monkeypatch.setattr("rrsq.runtime.decoding._FREE_BYTES", storages[2].nbytes - 1)
    pool.give_back(storages[2])
    assert pool.take(quantizers, windows, 1, 8, device) is not storages[2]


def test_graphs_of_other_hooks_are_thrown_away(model: Any) -> None:
    def graphs_of_a_cache() -> dict[Any, Any]:
        cache = DynamicCache(config=model.config)
        logits_of(model, random_tokens(4, 5), past_key_values=cache)
        return cache.layers[0].storage.graphs

    graphs_of_a_cache()["key"] = "a graph"
    assert graphs_of_a_cache() == {"key": "a graph"}
    hook = model.model.norm.register_forward_hook(lambda *_: None)
    try:
        assert graphs_of_a_cache() == {}
    finally:
        hook.remove()


def test_a_mask_of_each_head_is_attended_with(model: Any) -> None:
    tokens = random_tokens(1, 6)
    heads = model.config.get_text_config().num_attention_heads
    causal = torch.ones(6, 6, dtype=torch.bool).tril().expand(1, heads, 6, 6).clone()
    plain = logits_of(model, tokens, attention_mask=causal, past_key_values=DynamicCache(config=model.config))
    causal[:, -1, :, 0] = False
    causal[:, -1, 0, 0] = True
    masked = logits_of(
        model, tokens, attention_mask=causal, past_key_values=DynamicCache(config=model.config)
    )
    assert_near(plain, logits_of(model, tokens, use_cache=False))
    assert not torch.equal(masked, plain)


def test_an_offloaded_cache_holds_what_can_be_offloaded(model: Any) -> None:
    cache = DynamicCache(config=model.config)
    cache.offloading = True
    model.model.layers[0].self_attn.kv_quantizer._before_attention(
        model.model.layers[0].self_attn, (torch.zeros(1, 1, 8),), {"past_key_values": cache}
    )
    assert isinstance(cache.layers[0], QuantizedCacheLayer)


def test_layers_on_several_devices_have_a_storage_each(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = random_tokens(2, 10)
    expected = step_by_step(model, tokens, 6, DynamicCache(config=model.config))
    monkeypatch.setattr(model, "hf_device_map", {"model": 0, "lm_head": 1}, raising=False)
    cache = DynamicCache(config=model.config)
    assert_near(step_by_step(model, tokens, 6, cache), expected, 1e-5)
    assert len({id(layer.storage) for layer in cache.layers}) == len(cache.layers)


def test_cropping_and_batches(model: Any) -> None:
    tokens = random_tokens(2, 20)
    cache = DynamicCache(config=model.config)
    logits_of(model, tokens[:, :15], past_key_values=cache)
    cache.crop(-5)
    assert cache.get_seq_length() == 10
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(3)
    logits = logits_of(model, tokens[1:, 10:].repeat(3, 1), past_key_values=cache)
    expected = logits_of(model, tokens[1:], use_cache=False)[:, 10:]
    for row in logits:
        assert_near(row.unsqueeze(0), expected)


def test_iterating_gives_keys_and_values(model: Any) -> None:
    tokens = random_tokens(2, 12)
    cache = DynamicCache(config=model.config)
    logits_of(model, tokens, past_key_values=cache)
    plain = DynamicCache([(keys, values) for keys, values, *_ in cache])
    assert plain.get_seq_length() == 12
    assert plain.layers[0].keys.shape[-1] == cache.layers[0].quantizer.keys.head_dim


def test_a_reset_cache_is_empty(model: Any) -> None:
    tokens = random_tokens(1, 12)
    cache = DynamicCache(config=model.config)
    first = logits_of(model, tokens, past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(logits_of(model, tokens, past_key_values=cache), first)


def test_the_cache_is_small(model: Any) -> None:
    cache = DynamicCache(config=model.config)
    logits_of(model, random_tokens(2, 32), past_key_values=cache)
    for layer in cache.layers:
        scheme = layer.quantizer.keys
        entries = 2 * 2 * (24 if layer.is_sliding else 32) * scheme.kv_heads * scheme.head_dim
        assert layer.nbytes == entries * (4 + 16 / min(32, scheme.head_dim) * 3 / 2) / 8


def test_a_static_cache_that_holds_tokens_stays_as_it_is(model: Any) -> None:
    cache = StaticCache(config=model.config, max_cache_len=32)
    config = model.config.get_text_config()
    heads, size = config.num_key_value_heads, model.model.layers[0].self_attn.head_dim
    cache.early_initialization(1, heads, size, torch.float32, torch.device("cpu"))
    with pytest.warns(UserWarning, match="stays in 16 bits"):
        logits_of(model, random_tokens(1, 5), past_key_values=cache)


def test_a_model_can_be_copied_and_pickled(model: Any) -> None:
    tokens = random_tokens(1, 8)
    expected = generate(model, tokens).sequences
    assert torch.equal(generate(copy.deepcopy(model), tokens).sequences, expected)
    assert torch.equal(generate(pickle.loads(pickle.dumps(model)), tokens).sequences, expected)


@pytest.mark.parametrize(
    ("tokens", "capacity"), [(1, 512), (513, 1024), (4096, 4096), (5000, 6144), (7000, 8192)]
)
def test_capacities(tokens: int, capacity: int) -> None:
    assert enough(tokens) == capacity
