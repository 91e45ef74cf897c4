"""Gradients of whole models: those of the dequantized model, as if nothing were rounded on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import rrsq
from rrsq.runtime.kv_cache.layers import NoCache, QuantizedCacheLayer, token_positions
from rrsq.runtime.modules.int8_linear import Int8Linear
from rrsq.runtime.modules.linear import FusedLinears, QuantizedLinear
from tiny_quantized import logits_of, random_tokens

TOKENS = random_tokens(2, 10)


def gradients(model: Any, *, calls: tuple[int, ...], cached: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Of a loss over the last call of some that share a cache: its logits, and gradients by parameter."""
    model.zero_grad(set_to_none=True)
    cache = DynamicCache() if cached else None
    for tokens in TOKENS.split(calls, dim=1):
        logits = model(tokens, past_key_values=cache, use_cache=cached).logits
    logits.float().logsumexp(-1).square().sum().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def not_rounded(x: Tensor, rounded: Tensor) -> Tensor:
    """The rounded numbers, with the gradient of those that were not."""
    return x + (rounded - x).detach()


def dequantized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every quantized module computes a float product or hands on, and is rounded behind autograd's back."""
    linear, head, append = QuantizedLinear.forward, Int8Linear.forward, QuantizedCacheLayer.update

    def forward(self: QuantizedLinear, x: Tensor) -> Tensor:
        operand = x.float()
        if self.input_quantizer.rotation is not None:
            operand = self.input_quantizer.rotation(operand)
        if self.input_quantizer.channel_order is not None:
            operand = operand[..., self.input_quantizer.channel_order.long()]
        y = operand @ self.dequantized_weight().T
        return not_rounded(y.to(x.dtype), linear(self, x.detach()))

    def logits(self: Int8Linear, x: Tensor) -> Tensor:
        y = x.float() @ (self.weight_int8.float() * self.weight_scale.unsqueeze(1)).T
        return not_rounded(y.to(x.dtype), head(self, x.detach()))

    def passed(new: Tensor, rounded: Tensor) -> Tensor:
        old = rounded[..., : -new.shape[-2], :]
        return torch.cat((old, not_rounded(new, rounded[..., -new.shape[-2] :, :])), dim=-2)

    def update(self: QuantizedCacheLayer, keys: Tensor, values: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            both = append(self, keys.detach(), values.detach())
        return passed(keys, both[0]), passed(values, both[1])

    def without_cache(self: NoCache, keys: Tensor, values: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            stored = self.quantizer.encode(keys, values, token_positions(self.positions, keys, 0))
            both = self.quantizer.decode(stored, keys.dtype)
        return passed(keys, both[0]), passed(values, both[1])

    monkeypatch.setattr(FusedLinears, "_weight", lambda self: None)
    monkeypatch.setattr(QuantizedLinear, "forward", forward)
    monkeypatch.setattr(Int8Linear, "forward", logits)
    monkeypatch.setattr(QuantizedCacheLayer, "update", update)
    monkeypatch.setattr(NoCache, "update", without_cache)


@pytest.mark.parametrize(("calls", "cached"), [((10,), False), ((10,), True), ((6, 4), True)])
def test_they_are_those_of_the_dequantized_model(
    qwen2_checkpoint: Path, calls: tuple[int, ...], cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = rrsq.load(str(qwen2_checkpoint), device="cpu")
    logits, found = gradients(model, calls=calls, cached=cached)
    dequantized(monkeypatch)
    reference, expected = gradients(model, calls=calls, cached=cached)
    torch.testing.assert_close(logits, reference, rtol=1e-5, atol=1e-5)
    assert found.keys() == expected.keys()
    assert "model.layers.0.input_layernorm.weight" in found
    for name, gradient in expected.items():
        assert float(gradient.norm()) > 0
        assert float((found[name] - gradient).norm() / gradient.norm()) < 1e-4, name


def test_a_forward_pass_that_is_trained_gives_the_same_logits(qwen2_checkpoint: Path) -> None:
    model = rrsq.load(str(qwen2_checkpoint), device="cpu")
    logits, _ = gradients(model, calls=(10,), cached=False)
    assert torch.equal(logits, logits_of(model, TOKENS))


def test_keys_and_values_get_gradients(qwen2_checkpoint: Path) -> None:
    """In the first layer nothing but attention reads them."""
    model = rrsq.load(str(qwen2_checkpoint), device="cpu")
    seen = {}
    for name in ("k_proj", "v_proj"):
        linear = model.model.layers[0].self_attn.get_submodule(name)

        def keep(module: Any, args: Any, output: Tensor, name: str = name) -> None:
            output.retain_grad()
            seen[name] = output

        linear.register_forward_hook(keep)
    gradients(model, calls=(10,), cached=True)
    for output in seen.values():
        assert output.grad is not None
        assert float(output.grad.norm()) > 1e-3
