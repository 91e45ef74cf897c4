"""A whole model on the Triton kernels and on the eager reference: the same bits, up to the output head.

A head of 8 bits multiplies floating point numbers, whose sum hangs on its order.
"""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from rrsq import kernels
from rrsq.quantizer.pipeline import quantize_model
from tiny_quantized import VOCABULARY_SIZE, random_tokens, recipe_of

pytest.importorskip("triton")


@pytest.mark.parametrize("head_bits", [16, 8])
@pytest.mark.parametrize("recipe", ["rrs-w4a4kv4", "rrs-w4a8kv4"])
def test_logits_are_the_references(recipe, head_bits, device):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    model = quantize_model(
        Qwen2ForCausalLM(config), recipe_of(recipe, [f"head.bits={head_bits}"]), random_tokens(4, 64, seed=1)
    ).model.to(device)
    tokens = random_tokens(1, 5).to(device)
    hidden, logits = [], []
    for backend in ("triton", "eager"):
        with kernels.use_kernels(backend), torch.inference_mode():
            found = model(tokens, output_hidden_states=True)
        hidden.append(found.hidden_states[-1])
        logits.append(found.logits)
    assert torch.equal(*hidden)
    if head_bits == 16:
        assert torch.equal(*logits)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
