"""``torch.compile(model.forward, fullgraph=True)`` of a prompt and of a decode step, for every family."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import Unsupported
from transformers import DynamicCache

from rrsq.quantizer.pipeline import quantize_model
from rrsq.runtime.kv_cache.quantizer import KVQuantizer
from rrsq.runtime.ready import make_ready
from tiny_families import TINY, random_model, tiny_model
from tiny_quantized import random_tokens, recipe_of


@pytest.fixture(autouse=True)
def _traced_anew() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def ready(name: str, *overrides: str) -> Any:
    """A quantized model of the last two layers where they are unlike each other, else of one."""
    config = TINY[name]()
    text = config.get_text_config()
    kinds = ("layer_types", "no_rope_layers")
    layers = {kind: getattr(text, kind)[-2:] for kind in kinds if getattr(text, kind, None)}
    unlike = [kind for kind in layers.values() if len(set(kind)) > 1]
    text.num_hidden_layers = 2 if unlike or "moe" in name else 1
    for kind, of_layers in layers.items():
        setattr(text, kind, of_layers[: text.num_hidden_layers])
    model = quantize_model(
        random_model(config), recipe_of("rrs-w4a4kv4", overrides), random_tokens(2, 16, seed=1)
    ).model
    make_ready(model.eval())
    return model


@torch.no_grad()
def logits_of(model: Any, forward: Any, tokens: Tensor) -> Tensor:
    """Of a prompt and a step behind it."""
    cache = DynamicCache(config=model.config)
    parts = [
        forward(input_ids=tokens[:, first:last], past_key_values=cache).logits
        for first, last in ((0, 12), (12, 13))
    ]
    return torch.cat(parts, 1)


def assert_compiled_gives_the_same(model: Any, backend: str) -> None:
    tokens = random_tokens(1, 13)
    expected = logits_of(model, model.forward, tokens)
    compiled = torch.compile(model.forward, fullgraph=True, backend=backend)
    logits = logits_of(model, compiled, tokens)
    assert float((logits - expected).norm() / expected.norm()) < 0.02


# Tracing takes some ten seconds where layers are of several kinds, in the interpreter and not in a compiler.
@pytest.mark.filterwarnings("ignore:.*the router sent few tokens")
@pytest.mark.parametrize("name", TINY)
def test_a_forward_pass_is_one_graph(name: str) -> None:
    try:
        assert_compiled_gives_the_same(ready(name), "eager")
    except Unsupported:
        # Transformers 5.17 branches on the positions where the kind of RoPE depends on them.
        torch.compiler.reset()
        plain = tiny_model(name)
        with pytest.raises(Unsupported):
            assert_compiled_gives_the_same(plain, "eager")
        pytest.skip("transformers' own model is not one graph either")


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_so_it_is_where_attention_reads_codes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, by the operations' references."""
    monkeypatch.setattr(KVQuantizer, "reads_codes", lambda self, device: self._config is not None)
    assert_compiled_gives_the_same(ready(name), "eager")


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_compiles_it() -> None:
    assert_compiled_gives_the_same(ready("qwen2"), "inductor")


@pytest.mark.parametrize("bits", [8, 4])
def test_an_embedding_and_the_head_that_shares_it_are_in_the_graph(bits: int) -> None:
    model = ready("gemma3_text", f"embedding.bits={bits}", "head.bits=16")
    assert type(model.lm_head).__name__ == "SharedHead"
    assert_compiled_gives_the_same(model, "eager")
