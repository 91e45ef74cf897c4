"""The needle test: whether a model finds a number that stands in a long text.

A question is a window of text (the haystack) with sentences of the form "The secret number of Lisbon is
4821307." in it (the needles), four cities with a number each, and at its end the beginning of one of these
sentences, which the model has to complete. This is RULER's ``niah_multikey_1`` (arXiv 2404.06654) as a
completion, so that base models can be asked too, in a text of the user's own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from rrsq.errors import DataError, UsageError
from rrsq.runtime.format.loading import check_token_ids

__all__ = ["NEEDLES", "Answer", "Haystack", "Question", "ask", "questions"]

NEEDLES = 4
"""Sentences in a haystack, of which one is asked for."""
CITIES = """
Amman Bergen Cairo Dakar Dublin Geneva Hanoi Havana Kyoto Lagos Lima Lisbon Lyon Madrid Manila Milan
Nairobi Oslo Perth Porto Prague Quito Riga Rome Seoul Sofia Tokyo Tunis Turin Vienna Warsaw Zagreb
"""
DIGITS = 7
_SENTENCE_WITHIN = 64
"""Tokens before a needle's place in which the end of a sentence is looked for."""


@dataclass(frozen=True)
class Question:
    """What a model reads, and what it should go on with."""

    depth: int
    """Where the needle stands: 0 is the beginning of the text and 100 its end, next to the question."""
    prompt: Tensor
    """int64 ``[tokens]``."""
    answer: Tensor
    """int64 ``[tokens]``; with the prompt, as many as were asked for."""


@dataclass(frozen=True)
class Answer:
    """What a model made of a question."""

    depth: int
    correct: bool
    """Each token of the answer is the likeliest one: a greedy continuation begins with it."""
    logprob: float
    """Natural logarithm of the probability of the whole answer."""


class Haystack:
    """A text in which needles are hidden.

    Args:
        tokenizer: the model's.
        text: all of it.
        source: its name, for messages.
        start: a token that each prompt begins with, such as BOS; None: there is none.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, text: str, source: str, start: int | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._source = source
        self._start = [] if start is None else [start]
        self._tokens = self._encode(text)

    def question(self, length: int, depth: int, seed: str) -> Question:
        """Return a question of ``length`` tokens, the answer included.

        Args:
            length: tokens.
            depth: of the needle that is asked for, 0 to 100; the others stand anywhere.
            seed: of the place in the text, the cities, their numbers and the places of the others. The same
                text, tokenizer and seed give the same question on every machine.

        Raises:
            UsageError: the needles alone are longer.
            DataError: the text is shorter.
        """
        draw = random.Random(seed)
        numbers = {
            city: draw.randrange(10 ** (DIGITS - 1), 10**DIGITS)
            for city in draw.sample(CITIES.split(), NEEDLES)
        }
        needles = [self._encode(f"\nThe secret number of {city} is {n}.\n") for city, n in numbers.items()]
        asked, answer = self._asked(*next(iter(numbers.items())))
        room = length - len(self._start) - sum(map(len, needles)) - len(asked) - len(answer)
        if room < 1:
            raise UsageError(
                f"--context {length}: the sentences to be found and the question take {length - room} tokens."
                " Give more."
            )
        if room > len(self._tokens):
            raise DataError(
                f"'{self._source}' has {len(self._tokens)} tokens, too few for --context {length}. "
                "Use a longer text or a smaller context."
            )
        first = draw.randrange(len(self._tokens) - room + 1)
        hay = self._tokens[first : first + room]
        places = [depth, *(draw.uniform(0, 100) for _ in needles[1:])]
        cuts = [self._sentence_end(hay, round(room * place / 100)) for place in places]
        prompt, done = list(self._start), 0
        for cut, needle in sorted(zip(cuts, needles, strict=True), key=lambda pair: pair[0]):
            prompt += hay[done:cut] + needle
            done = cut
        prompt += hay[done:] + asked
        return Question(depth, torch.tensor(prompt), torch.tensor(answer))

    def _asked(self, city: str, number: int) -> tuple[list[int], list[int]]:
        """Tokens of the question, and of the answer as they are in the whole sentence."""
        question = f"\n\nThe secret number of {city} is"
        alone, whole = self._encode(question), self._encode(f"{question} {number}")
        pairs = enumerate(zip(alone, whole, strict=False))
        same = next((place for place, (one, other) in pairs if one != other), len(alone))
        return whole[:same], whole[same:]

    def _sentence_end(self, hay: list[int], place: int) -> int:
        """The end of the last sentence before ``place``, or ``place`` where none is near."""
        for cut in range(place, max(place - _SENTENCE_WITHIN, 0), -1):
            if str(self._tokenizer.decode([hay[cut - 1]])).rstrip(" ").endswith((".", "\n")):
                return cut
        return place

    def _encode(self, text: str) -> list[int]:
        # Without verbose=False the tokenizer warns that the text is longer than the model's context.
        encoded = self._tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return list(encoded["input_ids"])


def questions(haystack: Haystack, length: int, depths: Sequence[int], count: int) -> Iterator[Question]:
    """Yield ``count`` questions of ``length`` tokens, the depths in turn; fewer are the first ones."""
    for index in range(count):
        yield haystack.question(length, depths[index % len(depths)], f"needle {length} {index}")


@torch.no_grad()
def ask(model: PreTrainedModel, question: Question) -> Answer:
    """Let a model read the prompt into its KV cache, and give it the answer token by token.

    All tokens but the prompt's are decode steps, so that the cache and the kernels are those of
    ``generate()``. The model stays in the device, dtype and mode that it is in.

    Raises :class:`~rrsq.errors.DataError` if the model has no embedding for a token.
    """
    check_token_ids(model, question.prompt)
    check_token_ids(model, question.answer)
    device = model.get_input_embeddings().weight.device
    cache = DynamicCache(config=model.config)
    given = question.prompt[None].to(device)
    logprob, correct = 0.0, True
    for token in question.answer.tolist():
        outputs = model(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logprobs = outputs.logits[0, -1].float().log_softmax(-1)
        logprob += logprobs[token].item()
        correct = correct and int(logprobs.argmax()) == token
        given = torch.tensor([[token]], device=device)
    return Answer(question.depth, correct, logprob)
