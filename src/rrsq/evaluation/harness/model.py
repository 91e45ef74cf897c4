"""A loaded model as lm-eval sees it: lm-eval's own ``hf`` model with our batches and our progress."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rrsq.evaluation.harness.batches import plan_batches, token_budget, tokens_share_scales

__all__ = ["LoadedModel"]

Progress = Callable[[int, int], None]


class _Counter(CacheHook):
    """Hears of every answered request; lm-eval would write them to a database here."""

    def __init__(self, progress: Progress | None) -> None:
        super().__init__(None)
        self.progress = progress
        self.done = 0
        self.total = 0

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


class LoadedModel(HFLM):
    """lm-eval's ``hf`` model around a model that is loaded already.

    What is computed is left to lm-eval. With an automatic batch size, requests (sorted by falling length) are
    cut into batches of about as many tokens as fit, instead of trying how many make the device run out of
    memory: on a CPU that would end the process.

    Args:
        model, tokenizer: to evaluate.
        batch_size: requests at a time; None finds it.
        progress: called with the requests answered and the requests in all.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        if batch_size is None and tokens_share_scales(model):
            batch_size = 1
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size or "auto")
        self.budget = token_budget(model) if batch_size is None else 0
        self.longest_request = 1
        self._plan: list[int] = []
        self._counter = _Counter(progress)
        self.set_cache_hook(self._counter)

    def halve_budget(self) -> bool:
        """Halve the tokens of a batch after the device ran out of memory; False if that cannot help."""
        self.budget //= 2
        self._counter.done = self._counter.total = 0
        return self.budget > 0

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._counter.total += len(requests)
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        self._counter.total += len(requests)
        self.longest_request = self.max_length
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        self._counter.total += len(requests)
        prompts = (len(self.tok_encode(request.args[0])) for request in requests)
        self.longest_request = min(self.max_length, max(prompts, default=1) + self.max_gen_toks)
        return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        # lm-eval calls this with a progress bar for each batch of a rolling log-likelihood.
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def _batch_scheduler(self, pos: int, n_reordered_requests: Any) -> int:
        """Size of the batch that request ``pos`` is in; the requests are (text, context, continuation)."""
        if pos == 0:
            lengths = [len(context) + len(continuation) for _, context, continuation in n_reordered_requests]
            self._plan = plan_batches(lengths, self.budget)
        return self._plan[pos]

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        """Size of all batches of a rolling log-likelihood, or of prompts to continue."""
        return max(1, self.budget // self.longest_request)
