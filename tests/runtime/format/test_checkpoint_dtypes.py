"""What is float32 in a checkpoint stays float32 in whatever dtype the model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rrsq
from tiny_quantized import logits_of, quantize_tiny, random_tokens, recipe_of, save_tiny


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "auto"])
@pytest.mark.parametrize("through", ["rrsq", "transformers"])
def test_scales_and_offsets_stay_float32(qwen2_checkpoint: Path, dtype: str, through: str) -> None:
    if through == "rrsq":
        model = rrsq.load(str(qwen2_checkpoint), device="cpu", dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(qwen2_checkpoint, dtype=dtype)
    other = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    stored = load_file(qwen2_checkpoint / "model.safetensors")
    exact = 0
    for name, tensor in model.state_dict().items():
        if name.endswith("weight_scale") or "kv_quantizer" in name or not tensor.is_floating_point():
            exact += 1
            assert tensor.dtype == stored[name].dtype
            assert torch.equal(tensor, stored[name])
        else:
            assert tensor.dtype == other
            assert torch.equal(tensor, stored[name].to(other))
    assert exact > 20
    logits = logits_of(model, random_tokens(1, 12))
    assert logits.dtype == other
    assert bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precisions_are_close(qwen2_checkpoint: Path, dtype: str) -> None:
    """A rounding of the activations may move a 4-bit code, so the bound is that of a few moved codes."""
    tokens = random_tokens(2, 32)
    exact = logits_of(rrsq.load(str(qwen2_checkpoint), dtype="float32"), tokens)
    logits = logits_of(rrsq.load(str(qwen2_checkpoint), dtype=dtype), tokens).float()
    assert float((logits - exact).norm() / exact.norm()) < 0.3


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 2**-6), ("float16", 2**-9)])
def test_lower_precisions_are_tight_where_no_code_can_move(
    dtype: str, bound: float, tiny_qwen2_dir: Path, tmp_path: Path
) -> None:
    """With 4-bit weights and nothing else quantized, what is left is the rounding of the dtype itself."""
    quantized = quantize_tiny(tiny_qwen2_dir, recipe_of("gptq-w4a16"))
    out = save_tiny(quantized, tiny_qwen2_dir, tmp_path / "out")
    tokens = random_tokens(2, 32)
    exact = logits_of(rrsq.load(str(out), dtype="float32"), tokens)
    logits = logits_of(rrsq.load(str(out), dtype=dtype), tokens).float()
    assert float((logits - exact).norm() / exact.norm()) < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_a_loaded_model_keeps_them_too(qwen2_checkpoint: Path, dtype: torch.dtype) -> None:
    model = rrsq.load(str(qwen2_checkpoint), dtype="float32").to(dtype)
    stored = load_file(qwen2_checkpoint / "model.safetensors")
    for name, tensor in model.state_dict().items():
        if name.endswith("weight_scale") or "kv_quantizer" in name:
            assert torch.equal(tensor, stored[name]), name
    assert bool(torch.isfinite(logits_of(model, random_tokens(1, 12))).all())
