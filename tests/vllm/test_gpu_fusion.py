"""vLLM's engine on a GPU, compiled and with CUDA graphs, with norms and gates that quantize.

With vLLM as it is installed: run this file alone, since others make vLLM take this machine for another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from fake_vllm import REASON, has_vllm
from transformers import Gemma3TextConfig, LlamaConfig

import rrsq.vllm
from rrsq import kernels
from rrsq.vllm.engine import Engine
from tiny_families import COMMON, GEMMA3_ROPE
from tiny_quantized import random_tokens

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Make

pytestmark = [
    pytest.mark.skipif(not has_vllm(), reason=REASON),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, with vLLM"),
    pytest.mark.gpu,
]

SIZES: dict[str, Any] = {
    **COMMON,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "gemma3_text": lambda: Gemma3TextConfig(
        **SIZES,
        sliding_window=8,
        query_pre_attn_scalar=64,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={name: dict(rope) for name, rope in GEMMA3_ROPE.items()},
    ),
}
FUSED = kernels.rms_norm_quantize, kernels.add_rms_norm_quantize, kernels.gated_quantize
WINDOWS = [random_tokens(length, seed=length).clamp_max(500).tolist() for length in (2, 17, 60, 100)]


def log_probabilities(folder: Path) -> torch.Tensor:
    """Of the tokens of all windows."""
    options = {"max_model_len": 128, "gpu_memory_utilization": 0.3, "skip_tokenizer_init": True}
    engine = Engine(str(folder), {**options, "dtype": "bfloat16"})
    found = engine.log_probabilities(WINDOWS)
    engine.close()
    return torch.tensor([value for window in found for value in window])


@pytest.mark.parametrize("name", CONFIGS)
def test_an_engine_with_fewer_kernels(name: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes that fall to their neighbours change these random models by about an eighth of the spread.

    A wrong norm or gate changes them by more than all of it.
    """
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")  # Of the one, which the other would take.
    rrsq.vllm.register()
    folder = make(f"larger {name}", CONFIGS[name]())
    for operation in FUSED:
        operation._chosen.clear()
    actual = log_probabilities(folder)
    # Chosen when they run, in what is compiled too.
    assert all(any(device.type == "cuda" for device, *_ in operation._chosen) for operation in FUSED)
    for operation in FUSED:
        operation._chosen.clear()
    monkeypatch.setattr("rrsq.vllm.models.fuse", lambda *_: None)
    expected = log_probabilities(folder)
    assert not any(operation._chosen for operation in FUSED)
    assert (actual - expected).abs().mean() < 0.3 * expected.std()
