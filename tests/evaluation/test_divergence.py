"""KL divergence and top-1 agreement against a brute force in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rrsq.errors import UsageError
from rrsq.evaluation import reference as reference_module
from rrsq.evaluation.divergence import divergence, token_divergence
from rrsq.evaluation.reference import Reference
from rrsq.evaluation.tasks import TaskOptions, parse_tasks
from tiny_quantized import load_tiny, logits_of, quantize_tiny, random_tokens, recipe_of


def brute_force(reference: Any, model: Any, windows: torch.Tensor) -> tuple[np.ndarray, float]:
    """Divergence of every predicted token, and the share of equal top tokens, window by window in float64."""
    divergences, agreeing = [], []
    for window in windows:
        p, q = (logits_of(one, window[None])[0, :-1].double().numpy() for one in (reference, model))
        agreeing += list(p.argmax(1) == q.argmax(1))
        p, q = (np.exp(x - x.max(1, keepdims=True)) for x in (p, q))
        p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
        divergences += list((p * (np.log(p) - np.log(q))).sum(1))
    return np.array(divergences), float(np.mean(agreeing))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_divergence_of_a_quantized_model(tiny_llama_dir: Path, batch_size: int) -> None:
    reference = load_tiny(tiny_llama_dir)
    model: Any = quantize_tiny(tiny_llama_dir, recipe_of("rrs-w4a4kv4")).model
    windows = random_tokens(3, 40, seed=5)
    said: list[tuple[int, int, float]] = []
    result = divergence(
        model,
        Reference(reference),
        windows,
        batch_size=batch_size,
        logits_per_chunk=7 * 512,
        on_progress=lambda *call: said.append(call),
    )
    expected, agreement = brute_force(reference, model, windows)
    assert result.num_tokens == expected.size == 3 * 39
    assert result.mean.value == pytest.approx(expected.mean(), rel=1e-5)
    assert result.median.value == pytest.approx(np.sort(expected)[math.ceil(0.5 * 117) - 1], rel=1e-4)
    assert result.percentile_99.value == pytest.approx(np.sort(expected)[math.ceil(0.99 * 117) - 1], rel=1e-4)
    assert result.maximum == pytest.approx(expected.max(), rel=1e-4)
    assert result.top1_agreement.value == agreement
    assert result.mean.value > 1e-3
    assert said[-1] == (3, 3, pytest.approx(result.mean.value))


def test_standard_errors_are_over_windows(tiny_llama_dir: Path) -> None:
    reference = load_tiny(tiny_llama_dir)
    model: Any = quantize_tiny(tiny_llama_dir, recipe_of("rrs-w4a4kv4")).model
    windows = random_tokens(12, 30, seed=6)
    result = divergence(model, Reference(reference), windows)
    nats = brute_force(reference, model, windows)[0].reshape(12, 29)
    assert result.mean.stderr == pytest.approx(nats.mean(1).std(ddof=1) / 12**0.5, rel=1e-4)
    # numpy's own bootstrap, drawn otherwise.
    draws = np.random.default_rng(0).integers(12, size=(2000, 12))
    for fraction, found in ((0.5, result.median), (0.9, result.percentile_90), (0.99, result.percentile_99)):
        drawn = np.quantile(nats[draws].reshape(2000, -1), fraction, axis=1, method="inverted_cdf")
        assert found.stderr == pytest.approx(drawn.std(ddof=1), rel=0.2)
        assert found.value == pytest.approx(np.quantile(nats, fraction, method="inverted_cdf"), rel=1e-4)
    alone = divergence(model, Reference(reference), windows[:1])
    assert alone.mean.stderr is alone.median.stderr is None


def test_the_reference_runs_once_and_gives_the_same_bits(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    original = reference_module.final_states

    def counted(model: Any, token_ids: torch.Tensor) -> Any:
        ran.append(len(token_ids))
        return original(model, token_ids)

    monkeypatch.setattr(reference_module, "final_states", counted)
    reference = Reference(load_tiny(tiny_llama_dir))
    model: Any = quantize_tiny(tiny_llama_dir, recipe_of("rtn-w4a4")).model
    windows = random_tokens(3, 40, seed=5)
    options = {"batch_size": 2, "logits_per_chunk": 7 * 512}
    first, again = (divergence(model, reference, windows, **options) for _ in range(2))  # type: ignore[arg-type]
    assert ran == [2, 1]
    assert replace(first, seconds=0) == replace(again, seconds=0)
    hidden = reference.model.config.hidden_size
    assert reference.nbytes == 3 * 40 * hidden * 4
    fresh = [logits for logits in Reference(reference.model).logit_chunks(windows)]
    assert all(torch.equal(*pair) for pair in zip(fresh, reference.logit_chunks(windows), strict=True))


def test_a_model_does_not_diverge_from_itself(tiny_llama_dir: Path) -> None:
    model = load_tiny(tiny_llama_dir)
    result = divergence(model, Reference(model), random_tokens(2, 16))
    assert result.maximum == 0.0
    assert result.top1_agreement.value == 1.0


def test_the_direction_is_from_the_reference() -> None:
    p, q = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5]])
    expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert token_divergence(p.log(), q.log()).item() == pytest.approx(expected, rel=1e-5)


def test_task_needs_a_reference_of_its_vocabulary(
    tiny_llama_dir: Path, tiny_text_file: Path, tiny_tokenizer: Any
) -> None:
    (task,) = parse_tasks(f"kl:{tiny_text_file}")
    assert task.names == (f"kl:{tiny_text_file}",)
    assert parse_tasks("kl")[0].names == ("kl",)
    options = TaskOptions(sequence_length=32, limit=2)
    task.prepare(options)
    model = load_tiny(tiny_llama_dir)
    with pytest.raises(UsageError, match="none was given"):
        task.run(model, tiny_tokenizer, options)
    wider = load_tiny(tiny_llama_dir)
    wider.resize_token_embeddings(520)
    with pytest.raises(UsageError, match="520 entries and the model's 512"):
        task.run(model, tiny_tokenizer, TaskOptions(sequence_length=32, limit=2, reference=Reference(wider)))
    with pytest.raises(ValueError, match="520 and 512"):
        divergence(model, Reference(wider), random_tokens(1, 8))
    options = TaskOptions(sequence_length=32, limit=2, reference=Reference(model))
    ((result,),) = task.run(model, tiny_tokenizer, options).values()
    assert {metric.name: metric.value for metric in result.metrics} == {
        **dict.fromkeys(("kl_mean", "kl_median", "kl_p90", "kl_p99"), 0),
        "top1": 1,
    }
