"""The task ``kl``: divergence from the reference model over the windows of a text."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from rrsq.errors import UsageError
from rrsq.evaluation.results import Metric, TaskResult
from rrsq.evaluation.tasks import Task, TaskOptions, register_task
from rrsq.evaluation.text_windows import TextTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rrsq.evaluation.divergence import Estimate

__all__ = ["TextDivergence"]


class TextDivergence(TextTask):
    """KL divergence and top-1 agreement with a reference model over the consecutive windows of one text."""

    needs_reference = True

    def run(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: TaskOptions
    ) -> dict[str, list[TaskResult]]:
        """Compare the model with ``options.reference``.

        Raises :class:`UsageError` if there is none, its vocabulary has another size, or a window exceeds the
        model's context.
        """
        from rrsq.evaluation.divergence import divergence
        from rrsq.quantizer.calibration.windows import data_fingerprint

        reference = options.reference
        if reference is None:
            raise UsageError(f"Task '{self.name}' compares a model with a reference, and none was given.")
        vocabulary = model.config.get_text_config().vocab_size
        if reference.vocabulary != vocabulary:
            raise UsageError(
                f"Task '{self.name}' needs two models of one vocabulary; the reference's has "
                f"{reference.vocabulary} entries and the model's {vocabulary}."
            )
        windows, convention = self.windows(model, tokenizer, options)
        report = options.on_progress

        def on_progress(done: int, total: int, so_far: float) -> None:
            if report is not None:
                report(done, total, f"{so_far:.4f} nats a token")

        result = divergence(
            model, reference, windows, batch_size=options.batch_size or 1, on_progress=on_progress
        )
        measured = TaskResult(
            task=self.name,
            metrics=(
                _metric("kl_mean", result.mean),
                _metric("kl_median", result.median),
                _metric("kl_p90", result.percentile_90),
                _metric("kl_p99", result.percentile_99),
                _metric("top1", result.top1_agreement, higher_is_better=True),
            ),
            convention=f"{convention}; KL(reference || model) in "
            "nats of each next-token distribution, its mean, median, 90th and 99th percentile over all "
            "predicted tokens; the fraction of them whose likeliest token is the reference's; standard "
            "errors over windows.",
            seconds=result.seconds,
            data_fingerprint=data_fingerprint(windows),
            details=asdict(result),
        )
        return {self.name: [measured]}


def _metric(name: str, estimate: Estimate, *, higher_is_better: bool = False) -> Metric:
    return Metric(name, estimate.value, higher_is_better, stderr=estimate.stderr, relative=True)


@register_task("kl", argument="FILE", default="wikitext2")
def _kl(source: str) -> Task:
    return TextDivergence(name="kl" if source == "wikitext2" else f"kl:{source}", source=source)
