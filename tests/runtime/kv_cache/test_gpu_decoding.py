"""Decoding from codes as CUDA graphs, on a GPU."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from rrsq.runtime.decoding import Decoder, attach_decoder
from rrsq.runtime.prefill import Prefill
from tiny_families import tiny_model
from tiny_quantized import quantize_tiny, random_tokens, recipe_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module", params=["tiny_llama_dir", "tiny_qwen2_dir", "gemma2", "gemma3_text"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    if request.param.startswith("gemma"):
        folder = tmp_path_factory.mktemp(request.param)
        tiny_model(request.param).save_pretrained(folder)
    else:
        folder = request.getfixturevalue(request.param)
    quantized = quantize_tiny(folder, recipe_of("rrs-w4a4kv4")).model
    quantized.to("cuda", torch.bfloat16)
    attach_decoder(quantized)
    return quantized


def replayed(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the replays from now on."""
    count = [0]
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph: Any) -> None:
        count[0] += 1
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    return count


@torch.no_grad()
def logits_by_steps(model: Any, tokens: Tensor, prompt: int, mask: Tensor | None = None) -> Tensor:
    cache = DynamicCache(config=model.config)
    parts = []
    for first, last in [(0, prompt), *((i, i + 1) for i in range(prompt, tokens.shape[1]))]:
        given = {} if mask is None else {"attention_mask": mask[:, :last]}
        parts.append(
            model(input_ids=tokens[:, first:last], past_key_values=cache, use_cache=True, **given).logits
        )
    return torch.cat(parts, 1)


@pytest.mark.parametrize("masked", [False, True])
def test_a_graph_gives_what_the_forward_pass_gives(
    model: Any, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = random_tokens(3, 40).cuda()
    mask = torch.ones_like(tokens) if masked else None
    if mask is not None:
        mask[1, :7] = 0
    monkeypatch.setattr(Prefill, "_is_prompt", lambda *_: False)
    count = replayed(model, monkeypatch)
    logits = logits_by_steps(model, tokens, 18, mask)
    assert count[0] == 40 - 18 - 1
    again = logits_by_steps(model, tokens, 18, mask)
    assert count[0] == 2 * (40 - 18) - 1  # A second cache needs no capture.
    monkeypatch.setattr(Decoder, "_is_step", lambda *_: False)
    expected = logits_by_steps(model, tokens, 18, mask)
    seen = slice(None) if mask is None else mask.bool()
    assert torch.equal(again[seen], logits[seen])
    assert torch.equal(logits[seen], expected[seen])


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}]
)
def test_generate(model: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = random_tokens(2, 30).cuda()
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, **options}
    count = replayed(model, monkeypatch)
    first = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    assert count[0] >= 18
    monkeypatch.setattr(Decoder, "_is_step", lambda *_: False)
    monkeypatch.setattr(Prefill, "_is_prompt", lambda *_: False)
    assert torch.equal(first, model.generate(tokens, attention_mask=torch.ones_like(tokens), **options))


def test_results_of_earlier_steps_stay(model: Any) -> None:
    tokens = random_tokens(1, 6).cuda()
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(input_ids=tokens, past_key_values=cache)
        outputs = [model(input_ids=tokens[:, :1], past_key_values=cache).logits for _ in range(5)]
    assert len({output.data_ptr() for output in outputs}) == 5
    assert not torch.equal(outputs[3], outputs[4])


def test_a_hook_that_is_added_later_runs(model: Any) -> None:
    tokens = random_tokens(1, 20).cuda()
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    calls = []
    hook = model.model.norm.register_forward_hook(lambda *_: calls.append(1) or None)
    try:
        model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    finally:
        hook.remove()
    assert len(calls) == 12


def test_autocast_runs_as_it_is(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = random_tokens(1, 20).cuda()
    count = replayed(model, monkeypatch)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        logits_by_steps(model, tokens, 15)
    assert count[0] == 0


def test_threads(model: Any) -> None:
    tokens = [random_tokens(1, 20, seed=i).cuda() for i in range(4)]
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}

    def write(i: int) -> Tensor:
        return model.generate(tokens[i], attention_mask=torch.ones_like(tokens[i]), **options)

    alone = [write(i) for i in range(4)]
    together: dict[int, Tensor] = {}
    threads = [threading.Thread(target=lambda i=i: together.update({i: write(i)})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        assert torch.equal(together[i], alone[i])


def test_a_cast_model_is_captured_anew(model: Any) -> None:
    tokens = random_tokens(1, 20).cuda()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    model.half()
    model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    model.to(torch.bfloat16)
    assert torch.equal(model.generate(tokens, attention_mask=torch.ones_like(tokens), **options), expected)
