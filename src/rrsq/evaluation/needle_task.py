"""The task ``needle``: numbers to be found in texts of given lengths."""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from rrsq.errors import UsageError
from rrsq.evaluation.results import Metric, TaskResult
from rrsq.evaluation.tasks import Task, TaskOptions, register_task
from rrsq.quantizer.calibration.text import load_documents

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rrsq.evaluation.needle import Answer, Question
    from rrsq.evaluation.served import ServedModel

__all__ = ["NeedleTask"]

QUESTIONS_PER_DEPTH = 10
_REQUESTS = 16
"""Questions that an engine is given at a time."""


@dataclass
class NeedleTask:
    """Questions of :mod:`rrsq.evaluation.needle`, a result for each length of ``options.context``.

    Args:
        name: that it was asked for by.
        source: of the text, as :func:`load_documents` takes it.
    """

    name: str
    source: str
    needs_reference: ClassVar[bool] = False
    over_windows: ClassVar[bool] = False
    _text: str = field(init=False, repr=False, default="")
    _asked: str = field(init=False, repr=False, default="")

    @property
    def names(self) -> tuple[str, ...]:
        """The one name it was asked for by."""
        return (self.name,)

    def select(self, names: Sequence[str]) -> NeedleTask:
        """The task itself: it has one name."""
        return self

    def prepare(self, options: TaskOptions) -> None:
        """Load the text. Raises :class:`~rrsq.errors.DataError` as :func:`load_documents` does."""
        from rrsq.quantizer.calibration.windows import DOCUMENT_SEPARATOR

        documents = load_documents(self.source, split="test", data_root=options.data_root)
        self._text = DOCUMENT_SEPARATOR.join(documents)
        self._asked = f"{options.context} {options.depths} "

    def data_keys(self) -> dict[str, str]:
        """SHA-256 (hex) of the text, the lengths and the depths."""
        return {self.name: hashlib.sha256((self._asked + self._text).encode()).hexdigest()}

    def run(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: TaskOptions
    ) -> dict[str, list[TaskResult]]:
        """Ask the model, a question at a time.

        Raises:
            UsageError: a length exceeds the model's context, or is too short for a question.
            DataError: the text is too short.
        """
        from rrsq.evaluation.needle import ask

        asked = self._questions(model, tokenizer, options)
        progress = _Progress(options, sum(map(len, asked.values())))
        results = []
        for length, several in asked.items():
            started = time.perf_counter()
            answers: list[Answer] = []
            for question in several:
                answers.append(ask(model, question))
                progress.more(answers[-1:])
            results.append(self._result(length, several, answers, time.perf_counter() - started))
        return {self.name: results}

    def run_served(
        self, model: ServedModel, tokenizer: PreTrainedTokenizerBase, options: TaskOptions
    ) -> dict[str, list[TaskResult]]:
        """The same questions to an engine.

        Whether an answer is right is read from what it generates. The probability of the answer is that of
        a prompt which ends with it, so that no decode step is part of that number.
        """
        from rrsq.evaluation.needle import Answer
        from rrsq.runtime.format.loading import check_token_range

        asked = self._questions(model, tokenizer, options)
        engine = model.engine(max(asked) + 1)
        progress = _Progress(options, sum(map(len, asked.values())))
        results = []
        for length, several in asked.items():
            started = time.perf_counter()
            answers: list[Answer] = []
            for first in range(0, len(several), _REQUESTS):
                batch = several[first : first + _REQUESTS]
                prompts = [question.prompt.tolist() for question in batch]
                expected = [question.answer.tolist() for question in batch]
                wholes = [prompt + answer for prompt, answer in zip(prompts, expected, strict=True)]
                for question in batch:
                    check_token_range(question.prompt, engine.vocabulary)
                    check_token_range(question.answer, engine.vocabulary)
                made = engine.complete(prompts, max(map(len, expected)))
                logprobs = engine.log_probabilities(wholes)
                new = [
                    Answer(question.depth, tokens[: len(answer)] == answer, sum(each[-len(answer) :]))
                    for question, tokens, answer, each in zip(batch, made, expected, logprobs, strict=True)
                ]
                answers += new
                progress.more(new)
            results.append(self._result(length, several, answers, time.perf_counter() - started))
        return {self.name: results}

    def _questions(
        self, model: PreTrainedModel | ServedModel, tokenizer: PreTrainedTokenizerBase, options: TaskOptions
    ) -> dict[int, list[Question]]:
        """By length, all that is to be asked."""
        from rrsq.evaluation.needle import Haystack, questions

        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        for length in options.context:
            if longest is not None and length > longest:
                raise UsageError(
                    f"--context {length} exceeds the model's context of {longest}: "
                    f"give --context {longest} or less."
                )
        start = _start_token(model, tokenizer, options)
        haystack = Haystack(tokenizer, self._text, self.source, start)
        count = options.limit or QUESTIONS_PER_DEPTH * len(options.depths)
        return {
            length: list(questions(haystack, length, options.depths, count))
            for length in dict.fromkeys(options.context)
        }

    def _result(
        self, length: int, asked: Sequence[Question], answers: Sequence[Answer], seconds: float
    ) -> TaskResult:
        from rrsq.evaluation.needle import NEEDLES

        count = len(answers)
        depths = sorted({answer.depth for answer in answers})
        by_depth = [[answer for answer in answers if answer.depth == depth] for depth in depths]
        return TaskResult(
            task=f"{self.name}@{length}",
            metrics=_metrics(answers),
            convention=(
                f"{count} texts of {self.source} of {length} tokens, each with {NEEDLES} sentences 'The "
                "secret number of CITY is NUMBER.' in it; one of them, at a depth of "
                f"{', '.join(map(str, depths))} % in turn, is to be completed behind the text. exact_match: "
                "every token of the number is the likeliest one (binomial standard error); answer_logprob: "
                "the logarithm of the probability of the whole number, in nats, its mean over the texts."
            ),
            seconds=seconds,
            data_fingerprint=_fingerprint(asked),
            details={
                "context": length,
                "by_depth": [
                    {
                        "depth": several[0].depth,
                        "questions": len(several),
                        **{metric.name: metric.value for metric in _metrics(several)},
                    }
                    for several in by_depth
                ],
                "answers": [asdict(answer) for answer in answers],
            },
        )


class _Progress:
    """Tells of the questions answered."""

    def __init__(self, options: TaskOptions, total: int) -> None:
        self._report, self._total = options.on_progress, total
        self._done = self._right = 0

    def more(self, answers: Sequence[Answer]) -> None:
        self._done += len(answers)
        self._right += sum(answer.correct for answer in answers)
        if self._report is not None:
            self._report(self._done, self._total, f"{self._right} of {self._done} found")


def _metrics(answers: Sequence[Answer]) -> tuple[Metric, Metric]:
    """The fraction of right answers, and the mean log-probability, with standard errors."""
    count = len(answers)
    right = sum(answer.correct for answer in answers) / count
    logprobs = [answer.logprob for answer in answers]
    spread = statistics.stdev(logprobs) / math.sqrt(count) if _has_spread(logprobs) else None
    return (
        Metric("exact_match", right, higher_is_better=True, stderr=math.sqrt(right * (1 - right) / count)),
        # A ratio of logarithms says nothing: only the difference from the reference's is shown.
        Metric("answer_logprob", sum(logprobs) / count, higher_is_better=True, stderr=spread, relative=True),
    )


def _has_spread(values: Sequence[float]) -> bool:
    return len(values) > 1 and all(map(math.isfinite, values))


def _start_token(
    model: PreTrainedModel | ServedModel, tokenizer: PreTrainedTokenizerBase, options: TaskOptions
) -> int | None:
    """What a prompt begins with: BOS where the family needs it or the tokenizer puts it there by itself."""
    from rrsq.models.registry import needs_bos
    from rrsq.quantizer.calibration.windows import start_token

    bos: Any = tokenizer.bos_token_id
    adds = bos is not None and list(tokenizer("text")["input_ids"])[:1] == [bos]
    return start_token(tokenizer, options.bos, needed=adds or needs_bos(model.config))


def _fingerprint(asked: Sequence[Question]) -> str:
    """SHA-256 (hex) of all token ids, prompts and answers."""
    from rrsq.quantizer.calibration.windows import data_fingerprint

    digest = hashlib.sha256()
    for question in asked:
        digest.update(data_fingerprint(question.prompt).encode() + data_fingerprint(question.answer).encode())
    return digest.hexdigest()


@register_task("needle", argument="FILE", default="wikitext2")
def _needle(source: str) -> Task:
    return NeedleTask(name="needle" if source == "wikitext2" else f"needle:{source}", source=source)
