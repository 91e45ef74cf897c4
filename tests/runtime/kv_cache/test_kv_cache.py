"""The 4-bit KV cache: error, size, every operation a cache must know, and generate()."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from rrsq.recipe import CacheTensor, Recipe
from rrsq.runtime.kv_cache.layers import QuantizedCacheLayer
from rrsq.runtime.kv_cache.quantizer import CacheScheme, KVQuantizer
from rrsq.runtime.kv_cache.rope import KeyRotary
from rrsq.runtime.rotation.hadamard import orthonormal, plan_hadamard
from tiny_quantized import load_tiny, logits_of, quantize_tiny, random_tokens, recipe_of

HEADS, HEAD_DIM = 2, 16
ONLY_CACHE = ["activations={bits: 16}", "weights.group_size=2", "weights.method=rtn"]


FREQUENCY = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM)


def angles(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines as Llama computes them."""
    angle = positions[..., None].float() * FREQUENCY
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def make_quantizer(
    keys: CacheScheme | None = None, values: CacheScheme | None = None, offsets: bool = False
) -> KVQuantizer:
    quantizer = KVQuantizer(
        keys or CacheScheme(4, HEAD_DIM, False, True, offsets),
        values or CacheScheme(4, HEAD_DIM, False, False, offsets),
        HEADS,
        HEAD_DIM,
        KeyRotary(FREQUENCY),
    )
    generator = torch.Generator().manual_seed(7)
    for tensor in (quantizer.keys, quantizer.values):
        if tensor.offset is not None:
            tensor.offset.copy_(30 * torch.randn(HEADS, HEAD_DIM, generator=generator))
    return quantizer


def states(batch: int = 2, tokens: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, HEADS, tokens, HEAD_DIM)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def filled(quantizer: KVQuantizer | None = None, tokens: int = 5, batch: int = 2) -> QuantizedCacheLayer:
    layer = QuantizedCacheLayer(quantizer or make_quantizer())
    layer.update(*states(batch, tokens))
    return layer


def decoded(layer: QuantizedCacheLayer) -> tuple[Tensor, Tensor]:
    return layer.quantizer.decode(layer.stored, torch.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("group_size", [8, 16, 128])
def test_values_are_within_half_a_step(bits: int, zero_point: bool, group_size: int) -> None:
    scheme = CacheScheme(bits, group_size, zero_point, False, False)
    layer = QuantizedCacheLayer(make_quantizer(scheme, scheme))
    exact = states()
    for stored, x in zip(layer.update(*exact), exact, strict=True):
        groups = x.double().numpy().reshape(2, HEADS, 5, -1, min(group_size, HEAD_DIM))
        span = groups.max(-1) - groups.min(-1) if zero_point else 2 * np.abs(groups).max(-1)
        step = span / (2**bits - 1)
        error = np.abs(stored.double().numpy().reshape(groups.shape) - groups).max(-1)
        assert (error <= step * 0.5 + 0.003 * np.abs(groups).max(-1)).all()


def test_rotated_keys_are_within_half_a_step_after_rotation() -> None:
    layer = QuantizedCacheLayer(make_quantizer())
    keys, values = states()
    stored, _ = layer.update(keys, values)
    R = orthonormal(plan_hadamard(HEAD_DIM), torch.float64).numpy()
    rotated, back = keys.double().numpy() @ R, stored.double().numpy() @ R
    step = np.abs(rotated).max(-1, keepdims=True) / 7.5
    assert (np.abs(back - rotated) <= step * 0.51).all()


@pytest.mark.parametrize(("bits", "zero_point"), [(4, False), (4, True), (8, False)])
def test_it_really_takes_that_many_bits(bits: int, zero_point: bool) -> None:
    scheme = CacheScheme(bits, 8, zero_point, False, False)
    layer = QuantizedCacheLayer(make_quantizer(scheme, scheme))
    assert layer.nbytes == 0
    layer.update(*states(batch=2, tokens=5))
    entries = 2 * 2 * HEADS * 5 * HEAD_DIM
    codes = entries * bits // 8
    scales = entries // 8 * 2 * (2 if zero_point else 1)
    assert layer.nbytes == codes + scales
    recipe = CacheTensor(bits=bits, group_size=8, zero_point=zero_point)
    assert layer.nbytes * 8 / entries == recipe.bits_per_entry


def test_an_offset_costs_one_integer_a_token() -> None:
    assert filled(make_quantizer(offsets=True)).nbytes - filled().nbytes == 2 * 5 * 4


@pytest.mark.parametrize("offsets", [False, True])
def test_token_by_token_stores_what_one_call_stores(offsets: bool) -> None:
    quantizer = make_quantizer(offsets=offsets)
    keys, values = states(tokens=7)
    at_once, step_by_step = QuantizedCacheLayer(quantizer), QuantizedCacheLayer(quantizer)
    expected = at_once.update(keys, values)
    for i in range(7):
        result = step_by_step.update(keys[:, :, i : i + 1], values[:, :, i : i + 1])
        assert step_by_step.get_seq_length() == i + 1
    for new, old in zip(result, expected, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-5)


def eight_bit_bound(x: Tensor) -> Tensor:
    """Half a step of 8 bits, the rounding of the scale to float16, and float32 sums of large offsets."""
    return x.abs().amax(-1, keepdim=True) * (0.5 / 127.5 + 2.0**-11) + 2e-5


@pytest.mark.parametrize("padding", [0, 3])
def test_a_key_offset_is_put_back_at_its_position(padding: int) -> None:
    """Keys ``RoPE(k + b)`` with a huge ``b`` come back as precisely as ``RoPE(k)`` in 8 bits."""
    quantizer = make_quantizer(keys=CacheScheme(8, HEAD_DIM, False, False, True))
    keys, values = states(tokens=6)
    positions = (torch.arange(6) - padding).clamp_min(0).expand(2, 6)
    cos, sin = angles(positions)
    assert quantizer.keys.offset is not None
    offset = quantizer.keys.offset[None, :, None, :].expand_as(keys)
    rotated, _ = apply_rotary_pos_emb(keys + offset, keys, cos, sin)
    plain, _ = apply_rotary_pos_emb(keys, keys, cos, sin)
    layer = QuantizedCacheLayer(quantizer)
    layer.next_positions = positions
    stored, _ = layer.update(rotated, values)
    assert bool(((stored - rotated).abs() <= eight_bit_bound(plain)).all())
    assert float((stored - rotated).abs().max()) < 0.02 < float(quantizer.keys.offset.abs().max()) / 255 / 2


@pytest.mark.parametrize("padding", [0, 3])
def test_position_0_has_an_offset_of_its_own(padding: int) -> None:
    """Keys that are their offsets leave nothing to quantize, wherever in the batch position 0 is."""
    quantizer = make_quantizer(keys=CacheScheme(4, HEAD_DIM, False, True, True, signed=True, sink=True))
    offset, sink = quantizer.keys.offset, quantizer.keys.sink
    assert offset is not None
    assert sink is not None
    sink.copy_(-5 * offset.flip(1))
    positions = (torch.arange(6) - padding).clamp_min(0).expand(2, 6)
    own = torch.where((positions == 0)[:, None, :, None], sink[:, None, :], offset[:, None, :])
    keys, _ = apply_rotary_pos_emb(own, own, *angles(positions))
    layer = QuantizedCacheLayer(quantizer)
    layer.next_positions = positions
    stored, _ = layer.update(keys, states(tokens=6)[1])
    torch.testing.assert_close(stored, keys, rtol=1e-5, atol=1e-4)
    sink.copy_(offset)
    layer = QuantizedCacheLayer(quantizer)
    layer.next_positions = positions
    stored, _ = layer.update(keys, states(tokens=6)[1])
    assert float((stored - keys)[:, :, positions[0] == 0].abs().max()) > 1


def test_balanced_keys_are_stored_multiplied_and_read_divided() -> None:
    plain = make_quantizer(keys=CacheScheme(4, HEAD_DIM, False, True, False))
    balanced = make_quantizer(keys=CacheScheme(4, HEAD_DIM, False, True, False, balance=True))
    factor = 2.0 ** (torch.arange(HEADS * HEAD_DIM).view(HEADS, HEAD_DIM) % 5 - 2)
    assert balanced.keys.balance is not None
    balanced.keys.balance.copy_(factor)
    keys, values = states()
    expected, _ = QuantizedCacheLayer(plain).update(keys * factor[:, None, :], values)
    read, _ = QuantizedCacheLayer(balanced).update(keys, values)
    assert torch.equal(read, expected / factor[:, None, :])


def test_a_value_offset_is_put_back() -> None:
    layer = QuantizedCacheLayer(make_quantizer(values=CacheScheme(8, HEAD_DIM, False, False, True)))
    keys, values = states()
    assert layer.quantizer.values.offset is not None
    shifted = values + layer.quantizer.values.offset[None, :, None, :]
    _, stored = layer.update(keys, shifted)
    assert bool(((stored - shifted).abs() <= eight_bit_bound(values)).all())


@pytest.mark.parametrize("offsets", [False, True])
class TestOperations:
    """What generate() does to a cache, against the same on the decoded tensors."""

    def test_crop(self, offsets: bool) -> None:
        layer = filled(make_quantizer(offsets=offsets))
        before = decoded(layer)
        layer.crop(-2)
        assert layer.get_seq_length() == 3
        for new, old in zip(decoded(layer), before, strict=True):
            assert torch.equal(new, old[:, :, :3])
        layer.crop(0)
        assert layer.get_seq_length() == 3
        layer.crop(-5)
        assert layer.get_seq_length() == 0

    def test_reorder_for_beams(self, offsets: bool) -> None:
        layer = filled(make_quantizer(offsets=offsets))
        before = decoded(layer)
        layer.reorder_cache(torch.tensor([1, 1]))
        for new, old in zip(decoded(layer), before, strict=True):
            assert torch.equal(new, old[[1, 1]])

    def test_repeat_and_select(self, offsets: bool) -> None:
        layer = filled(make_quantizer(offsets=offsets))
        before = decoded(layer)
        layer.batch_repeat_interleave(3)
        for new, old in zip(decoded(layer), before, strict=True):
            assert torch.equal(new, old.repeat_interleave(3, 0))
        layer.batch_select_indices(torch.tensor([5, 0]))
        for new, old in zip(decoded(layer), before, strict=True):
            assert torch.equal(new, old[[1, 0]])

    def test_reset_and_reuse(self, offsets: bool) -> None:
        layer = filled(make_quantizer(offsets=offsets))
        before = decoded(layer)
        layer.reset()
        assert (layer.get_seq_length(), layer.nbytes, layer.is_initialized) == (0, 0, False)
        layer.update(*states())
        for new, old in zip(decoded(layer), before, strict=True):
            assert torch.equal(new, old)

    def test_offload_and_prefetch(self, offsets: bool) -> None:
        """The meta device stands for a GPU: tensors get there, and an attempt to copy from there fails."""
        layer = filled(make_quantizer(offsets=offsets))
        before = decoded(layer)
        layer.device = torch.device("meta")
        layer.offload()
        assert all(torch.equal(new, old) for new, old in zip(decoded(layer), before, strict=True))
        layer.prefetch()
        assert all(tensor.is_meta for tensor in (*layer.stored.values(), layer.keys, layer.values))
        with pytest.raises(NotImplementedError, match="copy out of meta"):
            layer.offload()

    def test_growing_after_each(self, offsets: bool) -> None:
        layer = filled(make_quantizer(offsets=offsets))
        layer.crop(-1)
        layer.batch_repeat_interleave(2)
        keys, values = layer.update(*states(batch=4, tokens=1))
        assert keys.shape == values.shape == (4, HEADS, 5, HEAD_DIM)


def test_operations_on_an_empty_layer_do_nothing() -> None:
    layer = QuantizedCacheLayer(make_quantizer())
    layer.crop(-1)
    layer.reorder_cache(torch.tensor([0]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0]))
    layer.reset()
    assert layer.get_seq_length() == 0


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """Weights nearly exact and activations in 16 bits, so that only the cache matters."""
    return recipe_of("rrs-w4a4kv4", ONLY_CACHE)


@pytest.fixture(scope="module", params=["tiny_llama_dir", "tiny_qwen2_dir"])
def model(request: pytest.FixtureRequest, recipe: Recipe) -> Any:
    return quantize_tiny(request.getfixturevalue(request.param), recipe).model


def assert_near(value: Tensor, reference: Tensor, tolerance: float = 1e-4) -> None:
    """A rounding difference may move a code by one now and then, hence not to the last bit."""
    assert float((value - reference).norm() / reference.norm()) < tolerance


def test_decoding_token_by_token_equals_one_prefill(model: Any) -> None:
    tokens = random_tokens(2, 24)
    expected = logits_of(model, tokens)
    cache = DynamicCache(config=model.config)
    parts = [logits_of(model, tokens[:, :10], past_key_values=cache)]
    parts += [logits_of(model, tokens[:, i : i + 1], past_key_values=cache) for i in range(10, 24)]
    assert all(isinstance(layer, QuantizedCacheLayer) for layer in cache.layers)
    assert cache.get_seq_length() == 24
    assert_near(torch.cat(parts, 1), expected)


def test_without_a_cache_the_logits_are_the_same(model: Any) -> None:
    tokens = random_tokens(2, 24)
    with_cache = logits_of(model, tokens, use_cache=True)
    assert torch.equal(logits_of(model, tokens, use_cache=False), with_cache)


def test_without_a_cache_positions_of_padded_prompts_count(model: Any) -> None:
    tokens = torch.cat((torch.full((1, 5), model.config.pad_token_id), random_tokens(1, 12)), 1)
    mask = (torch.arange(17) >= 5).long().unsqueeze(0)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    expected = logits_of(model, tokens[:, 5:], use_cache=False)
    for use_cache in (True, False):
        logits = logits_of(model, tokens, attention_mask=mask, position_ids=positions, use_cache=use_cache)
        assert_near(logits[:, 5:], expected)


def test_the_cache_is_small(model: Any) -> None:
    cache = DynamicCache()
    logits_of(model, random_tokens(2, 32), past_key_values=cache)
    config = model.config
    entries = 2 * 2 * 32 * config.num_key_value_heads * 16
    for layer in cache.layers:
        assert isinstance(layer, QuantizedCacheLayer)
        # Codes, float16 scales of groups of 16, and the positions (4 bytes a token).
        assert layer.nbytes == entries * (4 + 16 / 16) / 8 + 2 * 32 * 4
        assert layer.nbytes < entries * 2 / 2.5


def generate(model: Any, tokens: Tensor, **options: Any) -> Any:
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, **options}
    return model.generate(tokens, attention_mask=options.pop("mask", torch.ones_like(tokens)), **options)


def test_generate_uses_it_by_default(model: Any) -> None:
    tokens = random_tokens(2, 12)
    result = generate(model, tokens, min_new_tokens=8)
    cache = result.past_key_values
    assert all(isinstance(layer, QuantizedCacheLayer) for layer in cache.layers)
    assert cache.get_seq_length() == 19
    expected = tokens
    for _ in range(8):
        logits = logits_of(model, expected, use_cache=False)[:, -1].clone()
        logits[:, model.config.eos_token_id] = -math.inf
        expected = torch.cat((expected, logits.argmax(-1, keepdim=True)), 1)
    assert torch.equal(result.sequences, expected)


def test_beam_search(model: Any) -> None:
    tokens = random_tokens(2, 12)
    result = generate(model, tokens, num_beams=2, output_scores=True)
    assert all(isinstance(layer, QuantizedCacheLayer) for layer in result.past_key_values.layers)
    without = generate(model, tokens, num_beams=2, output_scores=True, use_cache=False)
    assert torch.equal(result.sequences, without.sequences)
    torch.testing.assert_close(result.sequences_scores, without.sequences_scores, rtol=1e-3, atol=1e-3)


def test_left_padding_changes_nothing(model: Any) -> None:
    """Positions of a left-padded prompt start late: the key offset must follow them, not the slots."""
    tokens = random_tokens(1, 12)
    padding = torch.full((1, 5), model.config.pad_token_id)
    padded = torch.cat((padding, tokens), 1)
    mask = torch.cat((torch.zeros_like(padding), torch.ones_like(tokens)), 1)
    alone = generate(model, tokens, output_logits=True, min_new_tokens=8)
    shifted = generate(model, padded, mask=mask, output_logits=True, min_new_tokens=8)
    assert torch.equal(alone.sequences, shifted.sequences[:, 5:])
    for a, b in zip(alone.logits, shifted.logits, strict=True):
        assert_near(b, a)


@pytest.mark.parametrize("padding", [0, 5])
def test_eight_bits_are_close_to_the_unquantized_cache(tiny_qwen2_dir: Path, padding: int) -> None:
    """Qwen2 with huge key biases: the model's own logits, within what 8-bit keys and values cost."""
    recipe = recipe_of("rrs-w4a4kv4", [*ONLY_CACHE, "kv_cache.values.bits=8"])
    quantized = quantize_tiny(tiny_qwen2_dir, recipe).model
    for layer in quantized.model.layers:
        layer.self_attn.kv_quantizer.keys.set_bits(8)
    plain = quantize_tiny(tiny_qwen2_dir, recipe.model_copy(update={"kv_cache": None})).model
    tokens = torch.cat((torch.full((2, padding), 1), random_tokens(2, 20)), 1).long()
    mask = torch.cat((torch.zeros(2, padding), torch.ones(2, 20)), 1).long()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    kwargs = {"attention_mask": mask, "position_ids": positions}
    before, after = (logits_of(m, tokens, **kwargs)[:, padding:] for m in (plain, quantized))
    assert_near(after, before, 0.03)


def test_the_offset_rescues_huge_key_biases(tiny_qwen2_dir: Path) -> None:
    """Four-bit keys of a model with huge key biases, with the calibrated mean taken off and without."""
    tokens = random_tokens(2, 40)
    recipe = recipe_of("rrs-w4a4kv4", ONLY_CACHE)
    plain = logits_of(
        quantize_tiny(tiny_qwen2_dir, recipe.model_copy(update={"kv_cache": None})).model, tokens
    )
    errors = {}
    for offset in ("mean", "none"):
        changed = recipe_of(
            "rrs-w4a4kv4",
            [*ONLY_CACHE, f"kv_cache.keys.offset={offset}"],
        )
        logits = logits_of(quantize_tiny(tiny_qwen2_dir, changed).model, tokens)
        errors[offset] = float((logits - plain).norm() / plain.norm())
    assert errors["mean"] < errors["none"]


def test_a_static_cache_stays_in_16_bits_with_a_warning(model: Any) -> None:
    cache = StaticCache(config=model.config, max_cache_len=32)
    with pytest.warns(UserWarning, match="KV cache stays in 16 bits: 'StaticLayer'"):
        logits_of(model, random_tokens(1, 8), past_key_values=cache)


def test_a_cache_that_already_holds_tokens_is_left_alone(tiny_llama_dir: Path, recipe: Recipe) -> None:
    model = quantize_tiny(tiny_llama_dir, recipe).model
    cache = DynamicCache()
    logits_of(load_tiny(tiny_llama_dir), random_tokens(1, 8), past_key_values=cache)
    with pytest.warns(UserWarning, match="KV cache stays in 16 bits: 'DynamicLayer'"):
        logits_of(model, random_tokens(1, 1), past_key_values=cache)
    assert cache.get_seq_length() == 9


def test_the_usual_ways_of_running_do_not_warn(model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = DynamicCache()
        for _ in range(2):
            logits_of(model, random_tokens(1, 4), past_key_values=cache)
        logits_of(model, random_tokens(1, 4))
        logits_of(model, random_tokens(1, 4), use_cache=False)


def test_a_cache_can_be_reset_between_prompts(model: Any) -> None:
    cache = DynamicCache(config=model.config)
    first = logits_of(model, random_tokens(1, 9), past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(logits_of(model, random_tokens(1, 9), past_key_values=cache), first)
