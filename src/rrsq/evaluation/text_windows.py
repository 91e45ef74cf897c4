"""Tasks over a text, cut into consecutive windows for a model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from rrsq.errors import UsageError
from rrsq.quantizer.calibration.text import load_documents

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from typing_extensions import Self

    from rrsq.evaluation.served import ServedModel
    from rrsq.evaluation.tasks import TaskOptions

__all__ = ["TextTask"]


@dataclass
class TextTask:
    """A task over the consecutive windows of one text: the test split of a data set, or a file.

    Args:
        name: that it was asked for by.
        source: as :func:`load_documents` takes it.
    """

    name: str
    source: str
    needs_reference: ClassVar[bool] = False
    over_windows: ClassVar[bool] = True
    _documents: list[str] = field(init=False, repr=False, default_factory=list)

    @property
    def names(self) -> tuple[str, ...]:
        """The one name it was asked for by."""
        return (self.name,)

    def select(self, names: Sequence[str]) -> Self:
        """The task itself: it has one name."""
        return self

    def prepare(self, options: TaskOptions) -> None:
        """Load the documents. Raises :class:`~rrsq.errors.DataError` as :func:`load_documents` does."""
        if options.sequence_length < 2:
            raise UsageError(f"--sequence-length must be at least 2, not {options.sequence_length}.")
        self._documents = load_documents(self.source, split="test", data_root=options.data_root)

    def data_keys(self) -> dict[str, str]:
        """SHA-256 (hex) of the documents and their boundaries."""
        digest = hashlib.sha256()
        for document in self._documents:
            encoded = document.encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return {self.name: digest.hexdigest()}

    def windows(
        self,
        model: PreTrainedModel | ServedModel,
        tokenizer: PreTrainedTokenizerBase,
        options: TaskOptions,
    ) -> tuple[Tensor, str]:
        """Windows, int64 ``[n, sequence_length]``, and how the text became them, in words.

        Raises :class:`UsageError` if they exceed the model's context, or are to begin with a BOS token that
        the tokenizer does not have.
        """
        from rrsq.models.registry import needs_bos
        from rrsq.quantizer.calibration.windows import evaluation_windows, start_token

        length = options.sequence_length
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and length > context:
            raise UsageError(
                f"Windows of {length} tokens exceed the model's context of {context}: "
                f"give --sequence-length {context} or less."
            )
        start = start_token(tokenizer, options.bos, needed=needs_bos(model.config))
        windows = evaluation_windows(tokenizer, self._documents, length, options.limit, start)
        return windows, _convention(self.source, windows, options, start)


def _convention(source: str, windows: Tensor, options: TaskOptions, start: int | None) -> str:
    """Say how a text became windows, up to what is computed over them."""
    begin = "" if start is None else f" (the BOS token and {windows.shape[1] - 1} of text)"
    return (
        f"Documents of {source} joined by a blank line and tokenized as one text; "
        f"{'all' if options.limit is None else 'the first'} {windows.shape[0]} consecutive windows of "
        f"{windows.shape[1]} tokens{begin}, the tail dropped; the first token of a window is not predicted"
    )
