"""Prompts as graphs, with graphs that run on a CPU: what a replay writes, and what is let alone."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from rrsq.runtime import decoding, prefill
from rrsq.runtime.decoding import attach_decoder
from rrsq.runtime.kv_cache.quantizer import KVQuantizer
from rrsq.runtime.prefill import MOST_TOKENS, Prefill, padded_length
from tiny_families import tiny_model
from tiny_quantized import logits_of, quantize_tiny, random_tokens, recipe_of


class FakePool:
    """Of graphs that run on a CPU."""

    @contextmanager
    def turn(self) -> Iterator[None]:
        yield


class FakeGraph:
    """Runs its function anew at each replay, and writes the result where the first one is."""

    captured = replayed = 0

    def __init__(self, function: Callable[[], Any], pool: FakePool) -> None:
        type(self).captured += 1
        self.function, self.pool = function, pool
        with torch.inference_mode(False), torch.no_grad():
            self.result = function()

    def replay(self) -> None:
        type(self).replayed += 1
        self.result[0].copy_(self.function()[0])


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[FakeGraph]:
    """On a CPU, codes that its references attend to, and graphs that are none."""
    made = type("Graphs", (FakeGraph,), {})
    monkeypatch.setattr(KVQuantizer, "reads_codes", lambda self, device: self._config is not None)
    monkeypatch.setattr(prefill, "can_capture", lambda device: True)
    monkeypatch.setattr(prefill, "CapturedGraph", made)
    monkeypatch.setattr(prefill, "GraphPool", FakePool)
    return made


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    made: dict[str, Any] = {}

    def model_of(family: str) -> Any:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            tiny_model(family).save_pretrained(folder)
            made[family] = quantize_tiny(folder, recipe_of("rrs-w4a4kv4")).model
        return made[family]

    return model_of


@pytest.fixture
def model(quantized: Callable[[str], Any]) -> Any:
    model = copy.deepcopy(quantized("llama"))
    attach_decoder(model)
    return model


def as_it_is(model: Any, run: Callable[[Any], Any]) -> Any:
    """What a model without graphs gives."""
    plain = copy.deepcopy(model)
    stand_ins = [module for module in plain.modules() if isinstance(vars(module).get("forward"), Prefill)]
    assert len(stand_ins) == 1
    del stand_ins[0].forward
    return run(plain)


def continued(model: Any, tokens: Tensor, prompt: int, **options: Any) -> Tensor:
    """Logits of a prompt and of the tokens behind it, one by one."""
    cache = DynamicCache(config=model.config)
    parts = [logits_of(model, tokens[:, :prompt], past_key_values=cache, **options)]
    assert cache.get_seq_length() == prompt
    for i in range(prompt, tokens.shape[1]):
        parts.append(logits_of(model, tokens[:, i : i + 1], past_key_values=cache))
    return torch.cat(parts, 1)


def assert_same(value: Tensor, reference: Tensor) -> None:
    """The reference's products of floats round by the number of rows, which moves a code now and then."""
    assert float((value - reference).norm() / reference.norm()) < 0.02


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma3", "opt", "mixtral", "smollm3"])
def test_prompts_of_other_lengths_give_what_they_give_without_graphs(
    family: str, quantized: Callable[[str], Any], graphs: type[FakeGraph]
) -> None:
    model = copy.deepcopy(quantized(family))
    attach_decoder(model)
    for prompt in (40, 33, 61, 40, 9, 14, 2):
        tokens = random_tokens(2, prompt + 4, seed=prompt)
        expected = as_it_is(model, lambda plain, t=tokens, p=prompt: continued(plain, t, p))
        assert_same(continued(model, tokens, prompt), expected)
    assert graphs.captured == 2
    assert graphs.replayed == 5


def test_the_cache_knows_what_a_graph_has_written(model: Any, graphs: type[FakeGraph]) -> None:
    tokens = random_tokens(2, 20)

    def cache_of(model: Any) -> list[Any]:
        cache = DynamicCache(config=model.config)
        logits_of(model, tokens, past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.crop(12)
        return [(layer.keys, layer.values) for layer in cache.layers]

    expected = as_it_is(model, cache_of)
    for _ in range(3):
        written = cache_of(model)
    assert graphs.replayed == 2
    for layer, other in zip(written, expected, strict=True):
        for tensor, reference in zip(layer, other, strict=True):
            assert tensor.shape == reference.shape
            assert_same(tensor, reference)


class KeptResult:
    """A graph that only keeps what its function gave."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.result = function()

    def replay(self) -> None:
        """Nothing."""


def test_a_captured_step_lets_go_of_its_cache(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "can_capture", lambda device: True)
    monkeypatch.setattr(decoding, "CapturedGraph", KeptResult)
    tokens, storages = random_tokens(1, 12), []
    for _ in range(2):
        cache = DynamicCache(config=model.config)
        for part in tokens.split((9, 1, 1, 1), 1):
            logits_of(model, part, past_key_values=cache)
        storages.append(cache.layers[0].storage)
        assert any(isinstance(graph, decoding._Graph) for graph in storages[-1].graphs.values())
        gone = weakref.ref(cache)
        del cache
        assert gone() is None
    assert storages[0] is storages[1]


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 5])])
def test_the_head_is_computed_of_what_is_asked_for(model: Any, keep: Any, graphs: type[FakeGraph]) -> None:
    tokens = random_tokens(1, 30)
    everything = as_it_is(model, lambda plain: logits_of(plain, tokens, use_cache=False))
    index = keep if isinstance(keep, Tensor) else slice(-keep, None)
    for _ in range(3):
        cache = DynamicCache(config=model.config)
        logits = logits_of(model, tokens, past_key_values=cache, logits_to_keep=keep)
        assert_same(logits, everything[:, index])
    assert graphs.replayed == 2


def test_positions_that_are_given(model: Any, graphs: type[FakeGraph]) -> None:
    tokens = random_tokens(2, 24)
    for first in (0, 7, 3):
        positions = torch.arange(first, first + 20).expand(2, -1)
        expected = as_it_is(model, lambda plain, p=positions: continued(plain, tokens, 20, position_ids=p))
        assert_same(continued(model, tokens, 20, position_ids=positions), expected)
    assert graphs.replayed == 2


def test_modes_may_change_between_capture_and_replay(model: Any, graphs: type[FakeGraph]) -> None:
    tokens = random_tokens(1, 30)
    for mode in (torch.inference_mode, torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            model(tokens, past_key_values=DynamicCache(config=model.config))
    assert graphs.replayed == 3


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}])
def test_generate(model: Any, options: dict[str, Any], graphs: type[FakeGraph]) -> None:
    tokens = random_tokens(2, 20)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **options}

    def write(model: Any) -> Tensor:
        return model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)

    expected = as_it_is(model, write)
    for _ in range(3):
        assert torch.equal(write(model), expected)
    assert graphs.replayed == 2


def hooked(model: Any) -> dict[str, Any]:
    model.model.layers[1].register_forward_hook(lambda *_: None)
    return {}


def trained(model: Any) -> dict[str, Any]:
    model.train()
    return {}


def adapted(model: Any) -> dict[str, Any]:
    model.peft_config = {}
    return {}


@pytest.mark.parametrize(
    "change",
    [
        hooked,
        trained,
        adapted,
        lambda model: {"output_hidden_states": True},
        lambda model: {"use_cache": False},
        lambda model: {"return_dict": False},
        lambda model: {"attention_mask": torch.tensor([[0] * 5 + [1] * 15])},
        lambda model: {"attention_mask": torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()},
        lambda model: {"input_ids": None, "inputs_embeds": model.model.embed_tokens(random_tokens(1, 20))},
    ],
)
def test_what_a_graph_does_not_know_runs_as_it_is(
    model: Any, change: Callable[[Any], dict[str, Any]], graphs: type[FakeGraph]
) -> None:
    given = {"input_ids": random_tokens(1, 20), **change(model)}
    with torch.no_grad():
        for _ in range(3):
            model(past_key_values=DynamicCache(config=model.config), **given)
    assert graphs.captured == 0
    assert not model.model.forward._graphs.used


def test_autocast_runs_as_it_is(model: Any, graphs: type[FakeGraph]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            logits_of(model, random_tokens(1, 20), past_key_values=DynamicCache(config=model.config))
    assert graphs.captured == 0


def test_more_tokens_on_a_cache_are_no_prompt(model: Any, graphs: type[FakeGraph]) -> None:
    tokens = random_tokens(1, 40)
    for _ in range(3):
        cache = DynamicCache(config=model.config)
        for part in tokens.split(20, 1):
            logits_of(model, part, past_key_values=cache)
    assert graphs.replayed == 2


def test_hidden_states_that_the_configuration_asks_for_are_not_padded(
    model: Any, graphs: type[FakeGraph]
) -> None:
    model.model.config.output_hidden_states = True
    tokens = random_tokens(1, 20)
    for _ in range(3):
        with torch.no_grad():
            outputs = model(tokens, past_key_values=DynamicCache(config=model.config))
        assert outputs.logits.shape[1] == outputs.hidden_states[0].shape[1] == 20
    assert graphs.captured == 0


def test_a_module_that_cannot_be_captured_runs_as_it_is(
    model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(function: Any, pool: Any) -> None:
        function()
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(prefill, "CapturedGraph", fail)
    tokens = random_tokens(1, 24)
    expected = as_it_is(model, lambda plain: continued(plain, tokens, 20))
    for _ in range(3):
        assert_same(continued(model, tokens, 20), expected)
    assert [record.getMessage() for record in caplog.records] == [
        "Prompts are not captured as CUDA graphs: operation not permitted. What they give is the same."
    ]


def test_scales_that_tokens_share_are_not_computed_with_padding(tiny_llama_dir: Any) -> None:
    for name, by_token in [("rrs-paper-w4a4kv4", False), ("rrs1-w4a4kv4", True), ("w16a16kv4", True)]:
        model = quantize_tiny(tiny_llama_dir, recipe_of(name)).model
        attach_decoder(model)
        assert isinstance(vars(model.model).get("forward"), Prefill) == by_token


def test_the_longest_prompts_memory_is_all_that_graphs_work_in(model: Any, graphs: type[FakeGraph]) -> None:
    state = model.model.forward._graphs

    def prompts(length: int) -> None:
        for _ in range(2):
            logits_of(model, random_tokens(1, length), past_key_values=DynamicCache(config=model.config))

    prompts(128)
    pool = state.pool
    prompts(64)
    assert state.pool is pool
    hidden = [graph.hidden for graph in kept_graphs(state)]
    assert hidden[0].data_ptr() == hidden[1].data_ptr()
    prompts(192)
    assert state.pool is not pool
    assert len(kept_graphs(state)) == 1
    prompts(64)
    assert len(kept_graphs(state)) == 2
    assert graphs.captured == 4


def kept_graphs(state: Any) -> list[Any]:
    kept = (owner().graphs.get(key) for (_, key), owner in state.used.items() if owner() is not None)
    return [graph for graph in kept if not isinstance(graph, str | None)]


def test_graphs_that_were_not_used_for_longest_are_dropped(
    model: Any, graphs: type[FakeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "_GRAPHS", 2)
    for length in (128, 128, 64, 64, 128, 192, 64):
        logits_of(model, random_tokens(1, length), past_key_values=DynamicCache(config=model.config))
    assert graphs.captured == 2
    assert len(model.model.forward._graphs.used) == 2
    # The one for 64 was dropped for the mark of 192.
    assert graphs.replayed == 3


def test_a_cast_model_is_captured_anew(model: Any, graphs: type[FakeGraph]) -> None:
    def run() -> Tensor:
        return logits_of(model, random_tokens(1, 20), past_key_values=DynamicCache(config=model.config))

    for _ in range(2):
        run()
    model.to(torch.bfloat16)
    assert run().dtype == torch.bfloat16
    assert graphs.captured == graphs.replayed == 1
    run()
    assert graphs.captured == graphs.replayed == 2


def test_a_model_can_be_copied_and_pickled(model: Any, graphs: type[FakeGraph]) -> None:
    tokens = random_tokens(1, 24)
    expected = [continued(model, tokens, 20) for _ in range(3)][-1]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.model.forward.module is other.model
        assert not other.model.forward._graphs.used
        for _ in range(2):
            assert torch.equal(continued(other, tokens, 20), expected)
    assert graphs.captured == 3


def test_a_cache_that_is_emptied_and_used_again(model: Any, graphs: type[FakeGraph]) -> None:
    cache = StaticCache(config=model.config, max_cache_len=64)
    for length in (40, 20, 33):
        tokens = random_tokens(1, length, seed=length)
        expected = as_it_is(model, lambda plain, t=tokens: logits_of(plain, t, use_cache=False))
        cache.reset()
        assert_same(logits_of(model, tokens, past_key_values=cache), expected)
        assert cache.get_seq_length() == length
    assert graphs.replayed == 2


@pytest.mark.parametrize(
    ("tokens", "length"),
    [(1, 16), (16, 16), (17, 64), (64, 64), (65, 128), (513, 576), (1025, 1152), (2049, 2304), (4096, 4096)],
)
def test_lengths(tokens: int, length: int) -> None:
    assert padded_length(tokens) == length


def test_little_is_added_to_a_prompt() -> None:
    lengths = {padded_length(tokens) for tokens in range(1, MOST_TOKENS + 1)}
    assert all(padded_length(tokens) <= tokens * 1.125 for tokens in range(513, MOST_TOKENS + 1))
    assert len(lengths) <= prefill._GRAPHS + 1
