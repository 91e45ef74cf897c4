"""The projected peak of memory against tensors counted while models of three sizes are quantized."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, MixtralConfig

from rrsq.models.llama import LLAMA
from rrsq.quantizer.pipeline import quantize_model
from rrsq.quantizer.production.source import empty_model
from rrsq.quantizer.projection import projected_memory
from tensor_bytes import TensorBytes
from tiny_quantized import recipe_of


class RandomWeights:
    """A store of random weights, of which one module's are there at a time."""

    progressed = None
    bytes_before = 0

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def check(self) -> None: ...

    def open(self, path: str) -> None:
        module = self.model.get_submodule(path)
        random = {name: torch.randn(t.shape, dtype=t.dtype) / 50 for name, t in module.state_dict().items()}
        module.load_state_dict(random, assign=True)

    def close(self, path: str) -> None:
        self.model.get_submodule(path).to("meta")

    drop = close

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        return None

    def before_overwrite(self, index: int) -> None: ...

    def commit(self, report: object, stream: tuple[Tensor, ...]) -> None: ...

    def bytes_after(self) -> int:
        return 0


def llama(hidden: int, vocabulary: int) -> LlamaConfig:
    """Of the proportions of Llama-3-8B."""
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 128,
        vocab_size=vocabulary,
        num_hidden_layers=2,
    )


def mixtral(hidden: int, experts: int) -> MixtralConfig:
    """Of the proportions of Mixtral-8x7B."""
    return MixtralConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 128,
        vocab_size=500,
        num_hidden_layers=2,
        num_local_experts=experts,
        num_experts_per_tok=2,
    )


@pytest.mark.parametrize(
    ("name", "config", "tokens"),
    [
        ("rrs-w4a4kv4", llama(128, 3000), 64),
        ("rrs-w4a4kv4", llama(128, 500), 256),
        ("rrs1-w4a4kv4", llama(128, 3000), 64),
        ("gptq-w4a16", llama(128, 2000), 128),
        ("rrs-w4a4kv4", llama(256, 500), 64),
        ("rrs-w4a4kv4", mixtral(128, 8), 64),
        ("rrs-w4a4kv4", mixtral(128, 4), 256),
        ("gptq-w4a16", mixtral(128, 4), 64),
        ("rtn-w4a4", mixtral(128, 8), 64),
    ],
)
@pytest.mark.filterwarnings("ignore:Layer")  # Experts that saw few tokens.
def test_the_projection_is_right(name: str, config: Any, tokens: int) -> None:
    model, recipe = empty_model(config, torch.bfloat16), recipe_of(name)
    projected = projected_memory(model, recipe, 8, tokens)
    windows = torch.randint(config.vocab_size, (8, tokens))
    with TensorBytes() as counted:
        quantize_model(model, recipe, windows, store=RandomWeights(model))
    assert counted.peak <= 1.05 * projected.memory("cpu")
    assert projected.memory("cpu") < 1.5 * counted.peak


def test_a_larger_text_only_takes_more_activations() -> None:
    model, recipe = empty_model(llama(256, 2000), torch.bfloat16), recipe_of("rrs-w4a4kv4")
    small, large = (projected_memory(model, recipe, count, 2048) for count in (16, 128))
    assert large.activations == 128 * 2048 * 256 * 2
    assert (large.device, large.host) == (small.device, small.host)
    assert large.memory("cpu") - small.memory("cpu") == large.activations - small.activations
    offloaded = projected_memory(model, recipe, 128, 2048, offloaded=True)
    assert offloaded.memory("cpu") == small.memory("cpu") - small.activations
    assert "offload folder" in offloaded.describe("cuda")


def test_an_8b_layer_is_what_it_is() -> None:
    """By hand: one decoder layer of Llama-3-8B in float32, what is kept of its Hessians, and one batch."""
    sizes = LLAMA.public["Llama-3-8B"]
    config = LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        vocab_size=128256,
        num_hidden_layers=1,
    )
    peak = projected_memory(empty_model(config, torch.bfloat16), recipe_of("rrs-w4a4kv4"), 128, 2048)
    weights = 4 * (4096 * (4096 + 1024 + 1024 + 4096 + 3 * 14336) + 2 * 4096)
    hessians = 4 * (3 * 4096**2 * 10 // 16 + 14336**2 * 36 // 64)
    batch = 4 * 4096 * (4 * 14336 + 4 * 4096)
    assert peak.device == weights + hessians + batch
    assert peak.activations == 128 * 2048 * 4096 * 2
