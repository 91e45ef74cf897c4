"""The signal-to-noise ratio that a Hessian gives is that of the outputs themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rrsq.quantizer.weights import output_snr_db, quantize_weight
from rrsq.recipe import Weights
from tiny_quantized import quantize_tiny, recipe_of


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("group_size", [None, 8])
def test_it_is_the_ratio_of_the_outputs(method: str, group_size: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(200, 32, generator=generator) * torch.logspace(-1, 1, 32)
    W = torch.randn(24, 32, generator=generator)
    recipe = Weights.model_validate({"method": method, "group_size": group_size})
    quantized = quantize_weight(W, recipe, X.T @ X)
    multiplier = np.ones((24, 1)) if quantized.multiplier is None else quantized.multiplier.numpy()
    steps = quantized.scale.double().numpy()[:, None] * multiplier.repeat(32 // multiplier.shape[1], 1)
    rounded = quantized.codes.double().numpy() * steps
    exact = X.double().numpy() @ W.double().numpy().T
    error = X.double().numpy() @ (W.double().numpy() - rounded).T
    expected = 10 * np.log10((exact**2).sum() / (error**2).sum())
    assert 5 < expected < 40
    np.testing.assert_allclose(quantized.values().numpy(), rounded, rtol=1e-6)
    assert output_snr_db(W, quantized.values(), X.T @ X) == pytest.approx(expected, abs=1e-3)


def test_without_a_finite_hessian_there_is_none() -> None:
    W = torch.ones(2, 4)
    assert output_snr_db(W, W * 0.5, torch.full((4, 4), torch.nan)) is None


def test_an_exact_weight_has_a_finite_ratio() -> None:
    W = torch.ones(2, 4)
    assert output_snr_db(W, W, torch.eye(4)) > 200  # type: ignore[operator]


def test_every_input_of_a_gptq_run_is_reported(tiny_llama_dir: Path) -> None:
    layers = quantize_tiny(tiny_llama_dir, recipe_of("gptq-w4a16")).report.layers
    for layer in layers:
        assert list(layer.weight_snr_db) == ["self_attn.qkv", "self_attn.o", "mlp.gate_up", "mlp.down"]
        assert all(8 < snr < 40 for snr in layer.weight_snr_db.values())
    layers = quantize_tiny(tiny_llama_dir, recipe_of("rtn-w4a4")).report.layers
    assert [layer.weight_snr_db for layer in layers] == [{}, {}, {}]
