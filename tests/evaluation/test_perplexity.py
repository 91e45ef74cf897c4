"""Perplexity against a brute-force computation: full logits, float64 log-softmax, one window at a time."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, PreTrainedModel

from rrsq.evaluation.perplexity import perplexity


@pytest.fixture(scope="module", params=["tiny_llama_dir", "tiny_qwen2_dir"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(request.getfixturevalue(request.param)).eval()


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randint(2, 470, (5, 33), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def brute_force_nll(model: PreTrainedModel, windows: torch.Tensor) -> float:
    losses = []
    for window in windows:
        logits = model(window[None]).logits[0].double()
        log_probabilities = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
        for position in range(1, len(window)):
            losses.append(-log_probabilities[position - 1, window[position]].item())
    return math.fsum(losses) / len(losses)


def test_against_brute_force(model: PreTrainedModel, windows: torch.Tensor) -> None:
    result = perplexity(model, windows)
    expected = brute_force_nll(model, windows)
    assert result.mean_nll == pytest.approx(expected, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert (result.num_windows, result.sequence_length, result.num_tokens) == (5, 33, 5 * 32)
    assert result.seconds > 0


@pytest.mark.parametrize("positions", [1, 7, 32, 1000])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_chunk_and_batch_size_do_not_matter(
    model: PreTrainedModel, windows: torch.Tensor, positions: int, batch_size: int
) -> None:
    expected = perplexity(model, windows).mean_nll
    result = perplexity(model, windows, batch_size=batch_size, logits_per_chunk=positions * 512)
    assert result.mean_nll == pytest.approx(expected, rel=1e-6)


def test_logits_stay_small(
    model: PreTrainedModel, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _m, _i, out: sizes.append(out.numel()))
    perplexity(model, windows, batch_size=5, logits_per_chunk=10 * 512)
    hook.remove()
    assert max(sizes) == 10 * 512
    assert sum(sizes) == 5 * 32 * 512


def test_windows_are_independent(model: PreTrainedModel, windows: torch.Tensor) -> None:
    alone = [perplexity(model, window[None]).mean_nll for window in windows]
    assert perplexity(model, windows).mean_nll == pytest.approx(sum(alone) / 5, rel=1e-6)


def test_progress_is_told(model: PreTrainedModel, windows: torch.Tensor) -> None:
    calls: list[tuple[int, int, float]] = []
    result = perplexity(model, windows, batch_size=2, on_progress=lambda *call: calls.append(call))
    assert [(done, total) for done, total, _ in calls] == [(2, 5), (4, 5), (5, 5)]
    assert calls[-1][2] == result.perplexity


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, vocab_size=512, final_logit_softcapping=0.5,
        ),
        GraniteConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, vocab_size=512, logits_scaling=0.1,
        ),
    ],
    ids=["softcapping", "logits_scaling"],
)  # fmt: skip
def test_families_that_transform_their_logits(config, windows: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    result = perplexity(model, windows, logits_per_chunk=7 * 512)
    assert result.mean_nll == pytest.approx(brute_force_nll(model, windows), rel=1e-6)


@pytest.mark.parametrize(("value", "is_expected"), [(math.nan, math.isnan), (1e30, math.isinf)])
def test_broken_models_are_not_glossed_over(
    tiny_qwen2_dir: Path, windows: torch.Tensor, value: float, is_expected
) -> None:
    broken = AutoModelForCausalLM.from_pretrained(tiny_qwen2_dir).eval()
    with torch.no_grad():
        broken.lm_head.weight[3] *= value
    assert is_expected(perplexity(broken, windows).perplexity)


@pytest.mark.parametrize("shape", [(0, 8), (2, 1), (8,)])
def test_nothing_to_predict_is_an_error(model: PreTrainedModel, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="windows must be"):
        perplexity(model, torch.zeros(shape, dtype=torch.int64))
