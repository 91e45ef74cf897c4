"""Prompts as CUDA graphs, on a GPU."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from rrsq.runtime.decoding import attach_decoder
from rrsq.runtime.graphs import CapturedGraph
from rrsq.runtime.prefill import MOST_TOKENS, Prefill, padded_length
from tiny_families import tiny_model
from tiny_quantized import quantize_tiny, random_tokens, recipe_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def model_of(family: str, folder: Any, recipe: str = "rrs-w4a4kv4") -> Any:
    tiny_model(family).save_pretrained(folder)
    quantized = quantize_tiny(folder, recipe_of(recipe)).model
    quantized.to("cuda", torch.bfloat16)
    attach_decoder(quantized)
    return quantized


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "opt"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return model_of(request.param, tmp_path_factory.mktemp("model"))


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[CapturedGraph]:
    """The graphs that were replayed, those of decode steps left out, whose result is no tuple."""
    seen: list[CapturedGraph] = []
    replay = CapturedGraph.replay

    def noted(graph: CapturedGraph) -> None:
        if isinstance(graph.result, tuple):
            seen.append(graph)
        replay(graph)

    monkeypatch.setattr(CapturedGraph, "replay", noted)
    return seen


@torch.no_grad()
def continued(model: Any, tokens: Tensor, prompt: int, **options: Any) -> Tensor:
    """Logits of a prompt and of the tokens behind it, one by one."""
    cache = DynamicCache(config=model.config)
    parts = [model(tokens[:, :prompt], past_key_values=cache, **options).logits]
    assert cache.get_seq_length() == prompt
    for i in range(prompt, tokens.shape[1]):
        parts.append(model(tokens[:, i : i + 1], past_key_values=cache).logits)
    return torch.cat(parts, 1)


def as_it_is(model: Any, tokens: Tensor, prompt: int) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prefill, "_is_prompt", lambda *_: False)
        return continued(model, tokens, prompt)


def assert_same(value: Tensor, reference: Tensor) -> None:
    assert value.shape == reference.shape
    assert float((value - reference).float().norm() / reference.float().norm()) < 0.01


@pytest.mark.parametrize("batch", [1, 3])
def test_a_graph_gives_what_the_forward_pass_gives(
    model: Any, batch: int, replays: list[CapturedGraph]
) -> None:
    for prompt in (200, 100, 125, 220, 65, 193, 7, 12, 64, 60):
        tokens = random_tokens(batch, prompt + 6, seed=prompt).cuda()
        expected = as_it_is(model, tokens, prompt)
        for _ in range(2):
            assert_same(continued(model, tokens, prompt), expected)
    assert len(replays) >= 10


def test_logits_of_the_last_token_and_an_attention_mask(model: Any, replays: list[CapturedGraph]) -> None:
    tokens = random_tokens(2, 90).cuda()
    expected = as_it_is(model, tokens, 90)[:, -1:]
    for _ in range(3):
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            given = {"attention_mask": torch.ones_like(tokens), "past_key_values": cache}
            assert_same(model(tokens, logits_to_keep=1, **given).logits, expected)
    assert len(replays) >= 2
    mask = torch.ones_like(tokens)
    mask[0, :9] = 0
    count = len(replays)
    with torch.no_grad():
        model(tokens, attention_mask=mask, past_key_values=DynamicCache(config=model.config))
    assert len(replays) == count


def test_modes_may_change_between_capture_and_replay(model: Any, replays: list[CapturedGraph]) -> None:
    tokens = random_tokens(4, 30).cuda()
    for mode in (torch.inference_mode, torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            cache = DynamicCache(config=model.config)
            model(tokens, past_key_values=cache)
            for _ in range(3):
                model(tokens[:, :1], past_key_values=cache)
    assert len(replays) == 3


def test_generate(model: Any, replays: list[CapturedGraph]) -> None:
    tokens = random_tokens(2, 75).cuda()

    def write(**options: Any) -> Tensor:
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **options}
        return model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)

    first = write()
    for _ in range(3):
        assert torch.equal(write(), first)
    assert len(replays) >= 2
    beams = [write(num_beams=2) for _ in range(3)]
    assert torch.equal(beams[0], beams[1])
    assert torch.equal(beams[0], beams[2])


def test_threads_and_streams(model: Any) -> None:
    prompts = [random_tokens(1, 60 + 30 * i, seed=i).cuda() for i in range(4)]
    alone = [continued(model, tokens, tokens.shape[1] - 4) for tokens in prompts]
    wrong: list[int] = []

    def write(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(8):
                logits = continued(model, prompts[i], prompts[i].shape[1] - 4)
                torch.cuda.current_stream().synchronize()
                if not torch.allclose(logits, alone[i], rtol=0.05, atol=0.05):
                    wrong.append(i)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_memory_is_that_of_the_longest_prompt(tmp_path: Any) -> None:
    model = model_of("llama", tmp_path)

    def prompts(*lengths: int) -> int:
        for length in lengths:
            for _ in range(3):
                with torch.no_grad():
                    tokens = random_tokens(1, length).cuda()
                    model(tokens, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    before = prompts(4096)
    assert prompts(3000, 2000, 1000, 500, 250, 125) - before < 2**24
    graphs = model.model.forward._graphs
    assert len(graphs.used) == 7


def test_experts(tmp_path: Any, replays: list[CapturedGraph]) -> None:
    model = model_of("mixtral", tmp_path)
    for prompt in (40, 60, 50):
        tokens = random_tokens(1, prompt + 3, seed=prompt).cuda()
        assert_same(continued(model, tokens, prompt), as_it_is(model, tokens, prompt))
    assert model.model.forward._graphs.refused is None
    assert len(replays) == 2


def test_long_prompts_run_as_they_are(model: Any, replays: list[CapturedGraph]) -> None:
    assert padded_length(MOST_TOKENS) == MOST_TOKENS
    if model.config.max_position_embeddings <= MOST_TOKENS and model.config.model_type == "opt":
        pytest.skip("OPT has no positions for so many tokens")
    for _ in range(3):
        with torch.no_grad():
            model(random_tokens(1, MOST_TOKENS + 1).cuda(), past_key_values=DynamicCache(config=model.config))
    assert not replays
