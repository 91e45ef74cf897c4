"""The perplexity tasks: ``wikitext2`` and ``text:SOURCE``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from rrsq.evaluation.results import Metric, TaskResult
from rrsq.evaluation.tasks import Task, TaskOptions, register_task
from rrsq.evaluation.text_windows import TextWindows

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rrsq.evaluation.perplexity import PerplexityResult, ProgressCallback
    from rrsq.evaluation.served import ServedModel

__all__ = ["TextPerplexity"]


@dataclass
class TextPerplexity:
    """Perplexity over the consecutive windows of one text."""

    name: str
    source: str
    needs_reference: bool = False
    over_windows: bool = True
    _text: TextWindows = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._text = TextWindows(self.source)

    @property
    def names(self) -> tuple[str, ...]:
        """The one name it was asked for by."""
        return (self.name,)

    def prepare(self, options: TaskOptions) -> None:
        """Load the documents; see :meth:`TextWindows.prepare`."""
        self._text.prepare(options)

    def data_keys(self) -> dict[str, str]:
        """A digest of the documents."""
        return {self.name: self._text.data_key()}

    def select(self, names: Sequence[str]) -> TextPerplexity:
        """The task itself: it has one name."""
        return self

    def run(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: TaskOptions
    ) -> dict[str, list[TaskResult]]:
        """Measure the perplexity. Raises :class:`UsageError` if a window exceeds the model's context."""
        from rrsq.evaluation.perplexity import perplexity

        windows, convention = self._text.windows(model, tokenizer, options)
        batch_size = options.batch_size or 1
        result = perplexity(model, windows, batch_size=batch_size, on_progress=_progress(options))
        return self._measured(result, windows, convention)

    def run_served(
        self, model: ServedModel, tokenizer: PreTrainedTokenizerBase, options: TaskOptions
    ) -> dict[str, list[TaskResult]]:
        """The same on the same windows, by what an engine says of their tokens' probabilities."""
        from rrsq.evaluation.perplexity import perplexity_by
        from rrsq.runtime.format.loading import check_token_range

        windows, convention = self._text.windows(model, tokenizer, options)
        engine = model.engine(options.sequence_length + 1)
        check_token_range(windows, engine.vocabulary)
        result = perplexity_by(engine.log_probabilities, windows, on_progress=_progress(options))
        return self._measured(result, windows, convention)

    def _measured(
        self, result: PerplexityResult, windows: Tensor, convention: str
    ) -> dict[str, list[TaskResult]]:
        from rrsq.quantizer.calibration.windows import data_fingerprint

        measured = TaskResult(
            task=self.name,
            metrics=(Metric("perplexity", result.perplexity, higher_is_better=False),),
            convention=f"{convention}; exp of the mean negative log-likelihood over all predicted tokens.",
            seconds=result.seconds,
            data_fingerprint=data_fingerprint(windows),
            details=asdict(result),
        )
        return {self.name: [measured]}


def _progress(options: TaskOptions) -> ProgressCallback:
    """Reports the windows done with the perplexity so far."""
    report = options.on_progress

    def on_progress(done: int, total: int, so_far: float) -> None:
        if report is not None:
            report(done, total, f"perplexity {so_far:.2f}")

    return on_progress


@register_task("wikitext2")
def _wikitext2(_: str) -> Task:
    return TextPerplexity(name="wikitext2", source="wikitext2")


@register_task("text", argument="FILE")
def _text(source: str) -> Task:
    return TextPerplexity(name=f"text:{source}", source=source)
