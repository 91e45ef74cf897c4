"""vLLM compiles a model as one graph for all numbers of tokens: the linears must let it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from fake_vllm import REASON, has_vllm, serve
from servable import SERVABLE, llama
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

if TYPE_CHECKING:
    from conftest import Make

pytestmark = pytest.mark.skipif(not has_vllm(), reason=REASON)

RECIPES = {
    "default": [],
    "8-bit activations": ["activations={bits: 8}"],
    "16-bit activations": ["activations={bits: 16}"],
    "real scales": ["activations={bits: 4, smoothing: {scales: real, group_size: 8}}"],
    "linears in 16 bits": ["modules_to_not_convert=['*.up_proj', '*.down_proj']"],
}


@pytest.mark.parametrize("name", RECIPES)
def test_an_mlp_is_one_graph(name: str, make: Make) -> None:
    mlp = serve(make("llama", llama(), RECIPES[name])).models[0].model.layers[0].mlp
    check_one_graph(mlp, 64)


def test_an_input_that_is_rotated_online(make: Make) -> None:
    mlp = serve(make("gemma2", SERVABLE["gemma2"]())).models[0].model.layers[0].mlp
    check_one_graph(mlp, 64)


def test_heads_rotated_among_each_other(make: Make) -> None:
    projection = serve(make("llama", llama())).models[0].model.layers[0].self_attn.o_proj
    check_one_graph(projection, 96)


def check_one_graph(module: Any, channels: int) -> None:
    torch._dynamo.reset()
    counters.clear()
    counter = CompileCounter()
    compiled = torch.compile(module.__call__, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (7, 1, 16, 33):
        x = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(tokens))
        if tokens == 7:
            torch._dynamo.mark_dynamic(x, 0)
        with torch.inference_mode():
            result, expected = compiled(x), module(x)
        result, expected = (y[0] if isinstance(y, tuple) else y for y in (result, expected))
        torch.testing.assert_close(result, expected)
    assert counter.frame_count <= 2  # One token may have a graph of its own; vLLM does not let it.


def test_the_ops_survive_functionalization(make: Make) -> None:
    """They write to none of their inputs, and say the shapes of their results without running."""
    mlp = serve(make("llama", llama())).models[0].model.layers[0].mlp
    torch._dynamo.reset()
    compiled = torch.compile(mlp.__call__, fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), mlp(x))
