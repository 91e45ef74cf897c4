"""Sliding layers of a cache of codes, which hold the window and little more."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from rrsq.kernels.cache_attend import QUERIES
from rrsq.runtime.decoding import attach_decoder
from rrsq.runtime.kv_cache import static
from rrsq.runtime.kv_cache.quantizer import KVQuantizer
from rrsq.runtime.prefill import MOST_TOKENS, padded_length
from tiny_families import WINDOW, tiny_model
from tiny_quantized import logits_of, quantize_tiny, random_tokens, recipe_of

ROWS = WINDOW + 16
RECIPE = ["activations.smoothing=null", "activations.bits=16", "weights.group_size=2", "weights.method=rtn"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two sliding layers and one that sees all."""
    folder = tmp_path_factory.mktemp("gemma3")
    tiny_model("gemma3_text").save_pretrained(folder)
    quantized = quantize_tiny(folder, recipe_of("rrs1-w4a4kv4", RECIPE)).model
    attach_decoder(quantized)
    return quantized


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes on a CPU too, with :data:`ROWS` rows in a sliding layer."""
    monkeypatch.setattr(KVQuantizer, "reads_codes", lambda self, device: self._config is not None)
    monkeypatch.setattr(static, "BEYOND_WINDOW", 16)
    monkeypatch.setattr(static, "_STEP", 8)


def in_parts(model: Any, tokens: Tensor, ends: Sequence[int], cache: Any) -> Tensor:
    """Logits of the tokens up to the last of ``ends``, a forward pass up to each."""
    begin = cache.get_seq_length()
    parts = [logits_of(model, tokens[:, a:b], past_key_values=cache) for a, b in pairwise((begin, *ends))]
    return torch.cat(parts, 1)


def assert_near(value: Tensor, reference: Tensor) -> None:
    """Codes next to a rounding boundary, and float16 in place of float32, make a small difference."""
    assert float((value - reference).norm() / reference.norm()) < 0.02


@pytest.mark.parametrize(
    "ends",
    [
        (90,),  # More than there are rows, at once.
        (3, 43, 90),  # The same behind tokens that are seen.
        (ROWS - 1, *range(ROWS, 91)),
        (*range(7, 90, 7), 90),
        (20, 21, 22, 60, 61, 62, 78, 90),
    ],
)
def test_rows_are_used_again(model: Any, ends: tuple[int, ...]) -> None:
    tokens = random_tokens(2, 90)
    cache = DynamicCache(config=model.config)
    logits = in_parts(model, tokens, ends, cache)
    assert_near(logits, logits_of(model, tokens, use_cache=False))
    assert [layer.pages.block_size for layer in cache.layers] == [ROWS, ROWS, 512]
    assert cache.get_seq_length() == 90
    assert [layer.keys.shape[2] for layer in cache.layers] == [WINDOW - 1, WINDOW - 1, 90]


@pytest.mark.parametrize("model_decodes", [True, False])
def test_moving_to_larger_storages(model: Any, model_decodes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """From rows for all tokens to few, and from few to as few."""
    tokens = random_tokens(1, 60)
    expected = logits_of(model, tokens, use_cache=False)
    for module in ("rrsq.runtime.decoding", "rrsq.runtime.kv_cache.static"):
        monkeypatch.setattr(f"{module}.enough", lambda tokens: -(-tokens // 12) * 12)
    monkeypatch.setattr(model.forward, "_pool", type(model.forward._pool)())
    if not model_decodes:  # Each layer has a storage of its own then.
        monkeypatch.setattr(model, "hf_device_map", {"model": 0, "lm_head": 1}, raising=False)
    cache = DynamicCache(config=model.config)
    assert_near(in_parts(model, tokens, (10, *range(11, 61)), cache), expected)
    assert [layer.pages.block_size for layer in cache.layers] == [ROWS, ROWS, 60]


def test_beams_and_batches(model: Any) -> None:
    tokens = random_tokens(2, 60)
    cache = DynamicCache(config=model.config)
    in_parts(model, tokens, (50, 51), cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_select_indices(torch.tensor([0, 1]))
    cache.batch_repeat_interleave(2)
    continued = logits_of(model, tokens[[1, 1, 0, 0], 51:], past_key_values=cache)
    assert_near(continued[::2], logits_of(model, tokens[[1, 0]], use_cache=False)[:, 51:])


def test_cropping_as_far_as_tokens_are_held(model: Any) -> None:
    tokens = random_tokens(1, 60)
    expected = logits_of(model, tokens, use_cache=False)
    cache = DynamicCache(config=model.config)
    in_parts(model, tokens, (50,), cache)
    # The token behind 33 sees seven of them, the first of which is 26: where token 50 would be.
    cache.crop(-17)
    assert_near(in_parts(model, tokens, (34, 38), cache), expected[:, 33:38])
    with pytest.raises(RuntimeError, match="window of 8 tokens cannot be cropped by 6"):
        cache.crop(32)
    in_parts(model, tokens, (60,), cache)
    with pytest.raises(RuntimeError, match="cannot be cropped by 18"):
        cache.crop(-18)
    cache.reset()
    assert_near(in_parts(model, tokens, (20,), cache), expected[:, :20])
    cache.crop(2)
    assert_near(in_parts(model, tokens, (24,), cache), expected[:, 2:24])


def test_what_padding_overwrites_is_not_seen(model: Any) -> None:
    """As a prompt that is captured: written with padding behind it, which does not count."""
    tokens = random_tokens(1, 60)
    expected = logits_of(model, tokens, use_cache=False)
    cache = DynamicCache(config=model.config)
    in_parts(model, tokens, (50,), cache)
    for layer in cache.layers:
        layer.filled(34, 50, layer.dtype)
        layer.used.fill_(34)
    assert_near(in_parts(model, tokens, (35, 60), cache), expected[:, 34:60])
    with pytest.raises(RuntimeError, match="cannot be cropped"):
        cache.crop(-28)


def test_there_are_rows_enough_for_padding_and_for_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    padding = max(padded_length(tokens) - tokens for tokens in range(1, MOST_TOKENS + 1))
    assert max(padding, QUERIES) <= static.BEYOND_WINDOW
    assert static.rows_of(512, 32768) == 768
    assert static.rows_of(512, 512) == 512
    assert static.rows_of(None, 32768) == 32768
