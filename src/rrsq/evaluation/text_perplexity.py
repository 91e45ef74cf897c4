"""The perplexity tasks: ``wikitext2`` and ``text:SOURCE``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from rrsq.calibration.text import load_documents
from rrsq.errors import UsageError
from rrsq.evaluation.tasks import Task, TaskOptions, TaskResult, register_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TextPerplexity"]


@dataclass
class TextPerplexity:
    """Perplexity over the consecutive windows of one text."""

    name: str
    source: str
    split: str = "test"
    _documents: list[str] = field(default_factory=list, repr=False)

    def prepare(self, options: TaskOptions) -> None:
        """Load the documents. Raises :class:`~rrsq.errors.DataError` as :func:`load_documents` does."""
        if options.sequence_length < 2:
            raise UsageError(f"--sequence-length must be at least 2, not {options.sequence_length}.")
        self._documents = load_documents(self.source, split=self.split, data_root=options.data_root)

    def run(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: TaskOptions
    ) -> TaskResult:
        """Measure the perplexity. Raises :class:`UsageError` if a window exceeds the model's context."""
        from rrsq.calibration.windows import data_fingerprint, evaluation_windows
        from rrsq.evaluation.perplexity import perplexity

        length = options.sequence_length
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and length > context:
            raise UsageError(
                f"Windows of {length} tokens exceed the model's context of {context}: "
                f"give --sequence-length {context} or less."
            )
        windows = evaluation_windows(tokenizer, self._documents, length, options.limit)
        report = options.on_progress

        def on_progress(done: int, total: int, so_far: float) -> None:
            if report is not None:
                report(done, total, f"perplexity {so_far:.2f}")

        result = perplexity(model, windows, batch_size=options.batch_size, on_progress=on_progress)
        return TaskResult(
            task=self.name,
            metric="perplexity",
            value=result.perplexity,
            higher_is_better=False,
            convention=_convention(
                self.source, length, result.num_windows, limited=options.limit is not None
            ),
            seconds=result.seconds,
            data_fingerprint=data_fingerprint(windows),
            details=asdict(result),
        )


def _convention(source: str, length: int, num_windows: int, *, limited: bool) -> str:
    return (
        f"Documents of {source} joined by a blank line and tokenized as one text; "
        f"{'the first' if limited else 'all'} {num_windows} consecutive windows of {length} tokens, "
        "the tail dropped; the first token of a window is not predicted; "
        "exp of the mean negative log-likelihood over all predicted tokens."
    )


@register_task("wikitext2")
def _wikitext2(_: str) -> Task:
    return TextPerplexity(name="wikitext2", source="wikitext2")


@register_task("text", argument="FILE")
def _text(source: str) -> Task:
    return TextPerplexity(name=f"text:{source}", source=source)
