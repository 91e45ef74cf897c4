"""How far a model's next-token distributions are from a reference model's.

Perplexity looks only at the probability of the token that came; a quantized model can keep it and yet answer
differently. The Kullback-Leibler divergence KL(P || Q) = sum over the vocabulary of P (log P - log Q), with P
the reference and Q the model, sees every token's probability. Zero is no difference.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rrsq.evaluation.logits import LOGITS_PER_CHUNK, logit_chunks
from rrsq.evaluation.reference import Reference

__all__ = ["DivergenceResult", "Estimate", "divergence"]

QUANTILES = (0.5, 0.9, 0.99)
RESAMPLES = 400


@dataclass(frozen=True)
class Estimate:
    """A number, and how far it would be off with other windows of the same text."""

    value: float
    stderr: float | None
    """Standard error; None of a single window."""


@dataclass(frozen=True)
class DivergenceResult:
    """Divergence over the windows; all but the agreement in nats. NaN where a model's logits are broken.

    Neighbouring tokens diverge alike, so that the windows are what standard errors are taken over: of the
    mean and the agreement as of a mean over windows, of the percentiles by drawing the windows anew (the
    bootstrap, with a seed of its own).
    """

    mean: Estimate
    """Mean KL(reference || model) of a predicted token."""
    median: Estimate
    percentile_90: Estimate
    percentile_99: Estimate
    """One predicted token in a hundred diverges more than this."""
    maximum: float
    top1_agreement: Estimate
    """Fraction of predicted tokens whose likeliest candidate is the reference's."""
    num_windows: int
    num_tokens: int
    seconds: float


@torch.inference_mode()
def divergence(
    model: PreTrainedModel,
    reference: Reference,
    windows: Tensor,
    *,
    batch_size: int = 1,
    logits_per_chunk: int = LOGITS_PER_CHUNK,
    on_progress: Callable[[int, int, float], None] | None = None,
) -> DivergenceResult:
    """Compare the next-token distributions of two models over ``windows``, token ids int64 ``[n, tokens]``.

    Their logits are compared a few positions at a time, ``logits_per_chunk`` logits of each at most; one
    number a token is kept. Log-probabilities are taken in float32, over the whole vocabulary.

    Raises :class:`ValueError` if the models' vocabularies differ in size, or there is nothing to predict.
    """
    if windows.ndim != 2 or windows.shape[0] == 0 or windows.shape[1] < 2:
        raise ValueError(f"windows must be [n >= 1, tokens >= 2], not {list(windows.shape)}")
    vocabulary = model.config.get_text_config().vocab_size
    if reference.vocabulary != vocabulary:
        raise ValueError(f"the models' vocabularies have {reference.vocabulary} and {vocabulary} entries")
    started = time.perf_counter()
    place = model.get_input_embeddings().weight.device
    divergences: list[Tensor] = []
    agreements: list[Tensor] = []
    done = 0
    total = 0.0
    for batch in windows.split(batch_size):
        chunks = (
            reference.logit_chunks(batch, logits_per_chunk),
            logit_chunks(model, batch.to(place), logits_per_chunk),
        )
        for expected, (logits, _) in zip(*chunks, strict=True):
            expected = expected.to(logits.device)
            nats = token_divergence(expected, logits)
            divergences.append(nats.cpu())
            total += nats.double().sum().item()
            agreements.append((expected.argmax(-1) == logits.argmax(-1)).cpu())
        done += len(batch)
        if on_progress is not None:
            on_progress(done, len(windows), total / (done * (windows.shape[1] - 1)))
    nats = torch.cat(divergences).double().view(len(windows), -1)
    median, percentile_90, percentile_99 = _quantiles(nats, QUANTILES)
    return DivergenceResult(
        mean=_mean(nats),
        median=median,
        percentile_90=percentile_90,
        percentile_99=percentile_99,
        maximum=nats.max().item(),
        top1_agreement=_mean(torch.cat(agreements).double().view(len(windows), -1)),
        num_windows=len(windows),
        num_tokens=nats.numel(),
        seconds=time.perf_counter() - started,
    )


def token_divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(reference) || softmax(logits)) in nats, float32 ``[positions]``.

    Args:
        reference, logits: ``[positions, vocabulary]`` of any floating dtype.
    """
    expected = reference.float().log_softmax(-1)
    actual = logits.float().log_softmax(-1)
    return (expected.exp() * (expected - actual)).sum(-1)


def _mean(values: Tensor) -> Estimate:
    """Of ``[windows, tokens]``."""
    by_window = values.mean(1)
    stderr = None if len(by_window) < 2 else by_window.std().item() / math.sqrt(len(by_window))
    return Estimate(values.mean().item(), stderr)


def _quantiles(values: Tensor, fractions: tuple[float, ...]) -> list[Estimate]:
    """Of ``[windows, tokens]``: the smallest value that at least a fraction of all values do not exceed."""
    windows, tokens = values.shape
    ordered, order = values.flatten().sort()
    window_of = order // tokens

    def places(counts: Tensor) -> Tensor:
        """Where the quantiles stand in ``ordered``, if each window were there so many times."""
        upto = counts[window_of].cumsum(0)
        wanted = torch.tensor([math.ceil(fraction * int(upto[-1])) for fraction in fractions])
        return torch.searchsorted(upto, wanted)

    found = ordered[places(torch.ones(windows, dtype=torch.int64))].tolist()
    if windows < 2:
        return [Estimate(value, None) for value in found]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(windows, (RESAMPLES, windows), generator=generator)
    resampled = torch.stack([ordered[places(one.bincount(minlength=windows))] for one in drawn])
    return [Estimate(*pair) for pair in zip(found, resampled.std(0).tolist(), strict=True)]
