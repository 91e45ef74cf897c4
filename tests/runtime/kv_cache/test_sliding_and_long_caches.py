"""Quantized cache layers with a sliding window, and RoPE whose angles change beyond a length."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Phi3Config
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding, apply_rotary_pos_emb

from rrsq.runtime.kv_cache.layers import QuantizedCacheLayer, QuantizedSlidingLayer
from rrsq.runtime.kv_cache.quantizer import CacheScheme, KVQuantizer
from rrsq.runtime.kv_cache.rope import KeyRotary

HEADS, HEAD_DIM, WINDOW = 2, 16, 5
EIGHT_BITS = CacheScheme(8, HEAD_DIM, False, False, False)


def states(tokens: int, seed: int = 0, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, HEADS, tokens, HEAD_DIM)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def sliding_layer(record_past: bool = False) -> QuantizedSlidingLayer:
    quantizer = KVQuantizer(EIGHT_BITS, EIGHT_BITS, HEADS, HEAD_DIM, None)
    return QuantizedSlidingLayer(quantizer, WINDOW, record_past=record_past)


def assert_same(layer: QuantizedSlidingLayer, reference: DynamicSlidingWindowLayer) -> None:
    assert layer.get_seq_length() == reference.get_seq_length()
    assert layer.get_max_length() == reference.get_max_length()
    assert layer.is_sliding == reference.is_sliding
    for queries in (1, 3, WINDOW + 2):
        assert layer.get_mask_sizes(queries) == reference.get_mask_sizes(queries)


@pytest.mark.parametrize("steps", [(1,) * 12, (3, 1, 1, 1, 1), (12, 1, 1), (4, 1, 1), (5, 1), (2, 9, 3)])
def test_it_counts_and_cuts_as_transformers_does(steps: tuple[int, ...]) -> None:
    layer, reference = sliding_layer(), DynamicSlidingWindowLayer(WINDOW)
    for seed, tokens in enumerate(steps):
        assert_same(layer, reference)
        new = states(tokens, seed)
        for got, expected in zip(layer.update(*new), reference.update(*new), strict=True):
            assert got.shape == expected.shape
            torch.testing.assert_close(got, expected, rtol=0, atol=0.03)
    assert_same(layer, reference)
    assert {tensor.shape[-2] for tensor in layer.stored.values()} == {min(sum(steps), WINDOW - 1)}


@pytest.mark.parametrize("removed", [0, 1, 3])
@pytest.mark.parametrize("tokens", [3, 9])
def test_cropping_while_the_past_is_recorded(tokens: int, removed: int) -> None:
    """As assisted generation does: propose tokens, then go back."""
    layer, reference = sliding_layer(), DynamicSlidingWindowLayer(WINDOW)
    layer.activate_past_recording()
    reference.activate_past_recording()
    for new in (states(tokens, 0), states(4, 1)):
        layer.update(*new)
        reference.update(*new)
    layer.crop(-removed)
    reference.crop(-removed)
    assert_same(layer, reference)
    new = states(2, 2)
    visible = layer.get_mask_sizes(2)[0]
    for got, expected in zip(layer.update(*new), reference.update(*new), strict=True):
        assert got.shape[-2] == visible
        torch.testing.assert_close(got, expected[..., -visible:, :], rtol=0, atol=0.03)


def test_a_full_window_cannot_go_back_otherwise() -> None:
    layer = sliding_layer()
    layer.update(*states(3))
    layer.crop(-1)
    assert layer.get_seq_length() == 2
    layer.crop(1)
    assert layer.get_seq_length() == 1
    layer.update(*states(7))
    layer.crop(0)
    layer.crop(20)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        layer.crop(-1)


def test_reset_beams_and_batches() -> None:
    layer = sliding_layer()
    keys, _ = layer.update(*states(7))
    layer.reorder_cache(torch.tensor([1, 1]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([3, 0, 1]))
    again, _ = layer.update(*states(1, seed=1, batch=3))
    assert again.shape[-2] == WINDOW
    assert torch.equal(again[:, :, :-1], keys[[1, 1, 1], :, -WINDOW + 1 :])
    layer.reset()
    assert (layer.get_seq_length(), layer.nbytes, layer.get_mask_sizes(3)) == (0, 0, (3, 0))


class Attention(torch.nn.Module):
    layer_idx = 0

    def forward(self, past_key_values: DynamicCache) -> tuple[Tensor, Tensor]:
        return past_key_values.update(*states(3), 0)


def test_an_attention_takes_over_window_and_recording() -> None:
    attention = Attention()
    KVQuantizer(EIGHT_BITS, EIGHT_BITS, HEADS, HEAD_DIM, None).attach(attention)
    cache = DynamicCache()
    empty = DynamicSlidingWindowLayer(WINDOW)
    empty.activate_past_recording()
    cache.layers.append(empty)
    attention(past_key_values=cache)
    layer = cache.layers[0]
    assert isinstance(layer, QuantizedSlidingLayer)
    assert (layer.sliding_window, layer.record_past, layer.get_seq_length()) == (WINDOW, True, 3)


def test_keys_of_short_and_long_texts_keep_their_angles() -> None:
    """longrope: keys stored while the text was short keep the angles of then, in a cache that grows."""
    half = HEAD_DIM // 2
    config = Phi3Config(
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
        original_max_position_embeddings=8,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 100.0,
            "short_factor": [1.0] * half,
            "long_factor": [3.0 + 0.2 * i for i in range(half)],
        },
    )
    rotary = Phi3RotaryEmbedding(config)
    scheme = CacheScheme(8, HEAD_DIM, False, False, True)
    key_rotary = KeyRotary.of(Phi3RotaryEmbedding, config)
    quantizer = KVQuantizer(scheme, EIGHT_BITS, HEADS, HEAD_DIM, key_rotary)
    offset = 30 * torch.randn(HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(3))
    assert quantizer.keys.offset is not None
    quantizer.keys.offset.copy_(offset)
    layer = QuantizedCacheLayer(quantizer)
    expected = []
    for seed, positions in enumerate(([0, 1, 2, 3, 4], [5, 6], [7], [8], [9, 10])):
        position_ids = torch.tensor([positions])
        keys, values = states(len(positions), seed)
        cos, sin = rotary(keys, position_ids)
        rotated, _ = apply_rotary_pos_emb(keys + offset[:, None], keys, cos, sin)
        expected.append(rotated)
        layer.next_positions = position_ids
        stored, _ = layer.update(rotated, values)
        exact = torch.cat(expected, dim=2)
        # A step of 8 bits of keys of some 4, where angles of the other length would be off by tens.
        assert float((stored - exact).abs().max()) < 0.05
    unlike = rotary(keys, torch.arange(8)[None])[0], rotary(keys, torch.arange(9)[None])[0][:, :8]
    assert float((unlike[0] - unlike[1]).abs().max()) > 0.5


def test_gradients_reach_the_new_tokens_of_a_window() -> None:
    layer = sliding_layer()
    layer.update(*states(7))
    keys, values = (tensor.requires_grad_() for tensor in states(3, seed=1))
    stored = layer.update(keys, values)
    grad = torch.randn(stored[0].shape, generator=torch.Generator().manual_seed(2))
    torch.autograd.backward(stored, (grad, 2 * grad))
    assert torch.equal(keys.grad, grad[..., -3:, :])
    assert torch.equal(values.grad, 2 * grad[..., -3:, :])
