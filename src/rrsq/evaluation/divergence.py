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

__all__ = ["DivergenceResult", "divergence"]


@dataclass(frozen=True)
class DivergenceResult:
    """Divergence over the windows; all but the agreement in nats. NaN where a model's logits are broken."""

    mean: float
    """Mean KL(reference || model) of a predicted token."""
    median: float
    percentile_99: float
    """One predicted token in a hundred diverges more than this."""
    maximum: float
    top1_agreement: float
    """Fraction of predicted tokens whose likeliest candidate is the reference's."""
    num_windows: int
    num_tokens: int
    seconds: float


@torch.inference_mode()
def divergence(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    windows: Tensor,
    *,
    batch_size: int = 1,
    logits_per_chunk: int = LOGITS_PER_CHUNK,
    on_progress: Callable[[int, int, float], None] | None = None,
) -> DivergenceResult:
    """Compare the next-token distributions of two models over ``windows``, token ids int64 ``[n, tokens]``.

    Both models run over the same batch of windows, and their logits are compared a few positions at a time,
    ``logits_per_chunk`` logits of each at most; one number a token is kept. Log-probabilities are taken in
    float32.

    Raises :class:`ValueError` if the models' vocabularies differ in size, or there is nothing to predict.
    """
    if windows.ndim != 2 or windows.shape[0] == 0 or windows.shape[1] < 2:
        raise ValueError(f"windows must be [n >= 1, tokens >= 2], not {list(windows.shape)}")
    sizes = [one.config.get_text_config().vocab_size for one in (reference, model)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"the models' vocabularies have {sizes[0]} and {sizes[1]} entries")
    started = time.perf_counter()
    divergences: list[Tensor] = []
    agreeing = 0
    done = 0
    total = 0.0
    for batch in windows.split(batch_size):
        chunks = [
            logit_chunks(one, batch.to(one.get_input_embeddings().weight.device), logits_per_chunk)
            for one in (reference, model)
        ]
        for (expected, _), (logits, _) in zip(*chunks, strict=True):
            expected = expected.to(logits.device)
            nats = token_divergence(expected, logits)
            divergences.append(nats.cpu())
            total += nats.double().sum().item()
            agreeing += int((expected.argmax(-1) == logits.argmax(-1)).sum())
        done += len(batch)
        if on_progress is not None:
            on_progress(done, len(windows), total / (done * (windows.shape[1] - 1)))
    nats = torch.cat(divergences).double()
    return DivergenceResult(
        mean=nats.mean().item(),
        median=_quantile(nats, 0.5),
        percentile_99=_quantile(nats, 0.99),
        maximum=nats.max().item(),
        top1_agreement=agreeing / nats.numel(),
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


def _quantile(values: Tensor, fraction: float) -> float:
    """The smallest value that at least ``fraction`` of all values do not exceed."""
    return values.kthvalue(math.ceil(fraction * values.numel())).values.item()
