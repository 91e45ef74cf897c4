"""Cut documents into token windows of one length, for calibration and for perplexity.

The documents are joined with a blank line and tokenized once, as one text. This is the convention of GPTQ
(arXiv 2210.17323) and QuaRot (arXiv 2404.00456), whose perplexities are the ones to compare with. Only the
first window then begins with the BOS token, if the tokenizer adds one. Some models, Gemma's, answer badly
without it; :func:`start_token` says whether each window begins with it.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from rrsq.errors import DataError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "DOCUMENT_SEPARATOR",
    "BosChoice",
    "calibration_windows",
    "data_fingerprint",
    "evaluation_windows",
    "start_token",
]

BosChoice = Literal["auto", "always", "never"]
"""Whether each window begins with the BOS token; ``auto``: if the model's family needs it."""

DOCUMENT_SEPARATOR = "\n\n"
# About ten times what 128 windows of 2048 tokens need; a larger text is thinned out, not tokenized whole.
MAX_CALIBRATION_CHARACTERS = 16_000_000


def start_token(tokenizer: PreTrainedTokenizerBase, choice: BosChoice, *, needed: bool) -> int | None:
    """Return the token that each window is to begin with, or None to cut the text as it is tokenized.

    Args:
        tokenizer: the model's.
        choice: what the user asked for.
        needed: the model's family needs BOS (:attr:`rrsq.models.ModelFamily.needs_bos`); for ``auto``.

    Raises :class:`UsageError` for ``always`` if the tokenizer has no BOS token.
    """
    token: int | None = tokenizer.bos_token_id
    if choice == "always" and token is None:
        raise UsageError("--bos always: the model's tokenizer has no BOS token.")
    return token if choice == "always" or (choice == "auto" and needed) else None


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    num_samples: int,
    sequence_length: int,
    seed: int,
    start: int | None = None,
) -> Tensor:
    """Return ``num_samples`` windows at random offsets as int64 ``[num_samples, sequence_length]``.

    The windows never overlap and stand in the order of the text: with T tokens and n windows of length L,
    n draws from 0..T - nL, sorted, are the gaps' running sums, so every such placement can occur. The same
    text, tokenizer and ``seed`` give the same windows on every machine. Of a text above 16 million characters
    only a random part of the documents (by the same seed) is tokenized. With ``start``, a token id, each
    window is that token and L - 1 tokens of text.

    A text too short for ``num_samples`` windows gives as many as it holds, with a warning; too short for one,
    :class:`DataError`.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = _tokenize(tokenizer, _thin_out(documents, generator), start)
    length = sequence_length - (start is not None)
    available = tokens.numel() // length
    if available == 0:
        raise _too_short(tokens, sequence_length)
    if available < num_samples:
        warnings.warn(
            f"The calibration text has {tokens.numel()} tokens: {available} windows of {sequence_length}, "
            f"not {num_samples}. Going on with {available}.",
            stacklevel=2,
        )
    count = min(num_samples, available)
    slack = tokens.numel() - count * length
    gaps = torch.randint(slack + 1, (count,), generator=generator).sort().values
    offsets = gaps + length * torch.arange(count)
    return _begun(tokens[offsets[:, None] + torch.arange(length)], start)


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    sequence_length: int,
    limit: int | None = None,
    start: int | None = None,
) -> Tensor:
    """Return consecutive windows of the whole text as int64 ``[n, sequence_length]``; the tail is dropped.

    ``limit`` keeps only the first so many windows. With ``start``, a token id, each window is that token and
    ``sequence_length - 1`` tokens of text. Raises :class:`DataError` if the text does not fill one.
    """
    tokens = _tokenize(tokenizer, documents, start)
    length = sequence_length - (start is not None)
    count = tokens.numel() // length
    if count == 0:
        raise _too_short(tokens, sequence_length)
    windows = tokens[: count * length].view(count, length)
    return _begun(windows if limit is None else windows[:limit], start)


def data_fingerprint(token_ids: Tensor) -> str:
    """Return the SHA-256 (hex) of token ids as little-endian int64, row by row: equal ids, equal text."""
    return hashlib.sha256(token_ids.cpu().contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def _begun(windows: Tensor, start: int | None) -> Tensor:
    """The windows, each behind ``start``."""
    return windows if start is None else torch.nn.functional.pad(windows, (1, 0), value=start)


def _tokenize(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], start: int | None) -> Tensor:
    """Token ids of the joined text, int64 ``[tokens]``.

    They begin with a BOS token if the tokenizer adds one, but not if each window will begin with ``start``.
    """
    text = DOCUMENT_SEPARATOR.join(documents)
    # Without verbose=False the tokenizer warns that the text is longer than the model's context.
    ids = tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"]
    tokens = torch.tensor(ids, dtype=torch.int64)
    return tokens[1:] if start is not None and tokens[:1].tolist() == [start] else tokens


def _thin_out(documents: Sequence[str], generator: torch.Generator) -> Sequence[str]:
    """Keep a random part of the documents, in their order, that stays within the character budget."""
    if sum(map(len, documents)) <= MAX_CALIBRATION_CHARACTERS:
        return documents
    kept: list[int] = []
    budget = MAX_CALIBRATION_CHARACTERS
    for index in torch.randperm(len(documents), generator=generator).tolist():
        kept.append(index)
        budget -= len(documents[index])
        if budget <= 0:
            break
    return [documents[index] for index in sorted(kept)]


def _too_short(tokens: Tensor, sequence_length: int) -> DataError:
    return DataError(
        f"The text has {tokens.numel()} tokens, too few for one window of {sequence_length}. "
        "Use a longer text or a smaller --sequence-length."
    )
