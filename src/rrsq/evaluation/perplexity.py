"""Perplexity of a causal language model over token windows.

The convention of GPTQ (arXiv 2210.17323) and of the tables that follow it: every window is run on its own,
its first token is given and not predicted, and the perplexity is exp of the mean negative log-likelihood over
all predicted tokens of all windows.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from rrsq.evaluation.logits import LOGITS_PER_CHUNK, logit_chunks
from rrsq.runtime.format.loading import check_token_ids

__all__ = ["PerplexityResult", "ProgressCallback", "perplexity", "perplexity_by"]

ProgressCallback = Callable[[int, int, float], None]
"""Called after each batch with the windows done, the windows in all, and the perplexity so far."""


@dataclass(frozen=True)
class PerplexityResult:
    """What a run over the windows gave. The numbers are ``inf`` or ``nan`` where the model's are."""

    perplexity: float
    mean_nll: float
    """Mean negative log-likelihood in nats per predicted token."""
    num_windows: int
    sequence_length: int
    num_tokens: int
    """Predicted tokens: one less than the sequence length in each window."""
    seconds: float
    tokens_per_second: float
    """Predicted tokens over time, of the median batch: the first one may have compiled its kernels."""


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    batch_size: int = 1,
    logits_per_chunk: int = LOGITS_PER_CHUNK,
    on_progress: ProgressCallback | None = None,
) -> PerplexityResult:
    """Return the perplexity of ``model`` over ``windows``, token ids int64 ``[n, sequence_length]``.

    The output head and the cross-entropy run over a few positions at a time, ``logits_per_chunk`` logits at
    most, so that memory does not grow with vocabulary times sequence length. Logits are taken to float32 and
    the token losses summed in float64. The model stays in the device, dtype and mode that it is in.

    Raises :class:`ValueError` if there is no window or a window has fewer than two tokens, and
    :class:`DataError` if the model has no embedding for a token.
    """
    if windows.ndim != 2 or windows.shape[0] == 0 or windows.shape[1] < 2:
        raise ValueError(f"windows must be [n >= 1, sequence_length >= 2], not {list(windows.shape)}")
    check_token_ids(model, windows)
    num_windows, sequence_length = windows.shape
    clock = _Clock()
    total = 0.0
    done = 0
    for batch in windows.split(batch_size):
        token_ids = batch.to(model.get_input_embeddings().weight.device)
        for logits, targets in logit_chunks(model, token_ids, logits_per_chunk):
            losses = cross_entropy(logits.float(), targets.to(logits.device), reduction="none")
            total += losses.double().sum().item()
        clock.finished(len(batch) * (sequence_length - 1))
        done += len(batch)
        if on_progress is not None:
            on_progress(done, num_windows, _exp(total / (done * (sequence_length - 1))))
    return _result(windows, total, clock)


def perplexity_by(
    score: Callable[[list[list[int]]], list[list[float]]],
    windows: Tensor,
    *,
    batch_size: int = 16,
    on_progress: ProgressCallback | None = None,
) -> PerplexityResult:
    """The same by an engine that gives no logits.

    Args:
        score: from windows of token ids to the logarithm of the probability of each token but the first.
        windows: int64 ``[n, sequence_length]``, at least one, of two tokens or more.
        batch_size: windows that it is given at a time.
        on_progress: told of progress.
    """
    clock = _Clock()
    total = 0.0
    done = 0
    for batch in windows.split(batch_size):
        losses = torch.tensor(score(batch.tolist()), dtype=torch.float64)
        if losses.shape != (len(batch), windows.shape[1] - 1):
            raise ValueError(f"{list(losses.shape)} log-probabilities came for windows {list(batch.shape)}")
        total -= losses.sum().item()
        clock.finished(losses.numel())
        done += len(batch)
        if on_progress is not None:
            on_progress(done, len(windows), _exp(total / (done * losses.shape[1])))
    return _result(windows, total, clock)


class _Clock:
    """Takes the time of each batch; a result must have been read of it."""

    def __init__(self) -> None:
        self.started = self._last = time.perf_counter()
        self.rates: list[float] = []

    def finished(self, tokens: int) -> None:
        """A batch of so many predicted tokens is done."""
        now = time.perf_counter()
        self.rates.append(tokens / max(now - self._last, 1e-9))
        self._last = now


def _result(windows: Tensor, total: float, clock: _Clock) -> PerplexityResult:
    num_windows, sequence_length = windows.shape
    num_tokens = num_windows * (sequence_length - 1)
    mean_nll = total / num_tokens
    return PerplexityResult(
        perplexity=_exp(mean_nll),
        mean_nll=mean_nll,
        num_windows=num_windows,
        sequence_length=sequence_length,
        num_tokens=num_tokens,
        seconds=time.perf_counter() - clock.started,
        tokens_per_second=statistics.median(clock.rates),
    )


def _exp(mean_nll: float) -> float:
    try:
        return math.exp(mean_nll)
    except OverflowError:
        return math.inf
