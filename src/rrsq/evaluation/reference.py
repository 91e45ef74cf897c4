"""The model that a divergence compares with, run once over each text however many models are compared."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from transformers import PreTrainedModel

from rrsq.evaluation.logits import LOGITS_PER_CHUNK, final_states, head_chunks, logit_chunks

__all__ = ["Reference"]


class Reference:
    """A model whose logits are asked for again and again, over the same windows.

    What its output head reads is kept in memory, on the CPU and in the dtype it came in: hidden size times
    bytes of the dtype a token, where the logits would take a hundred times that. The head is applied to it
    anew, in chunks of the same size, and so gives the same bits. Models whose forward pass changes the
    head's output (Gemma 2, Granite) run each time.

    Args:
        model: loaded, on its device.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._states: dict[bytes, Tensor] = {}

    @property
    def vocabulary(self) -> int:
        """Entries of the model's vocabulary."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def nbytes(self) -> int:
        """What is kept, in bytes."""
        return sum(states.numel() * states.element_size() for states in self._states.values())

    def logit_chunks(self, token_ids: Tensor, logits_per_chunk: int = LOGITS_PER_CHUNK) -> Iterator[Tensor]:
        """Logits ``[positions, vocabulary]``, as :func:`rrsq.evaluation.logits.logit_chunks` gives them.

        Args:
            token_ids: int64 ``[windows, tokens]`` on any device.
            logits_per_chunk: positions times vocabulary, at most.
        """
        place = self.model.get_input_embeddings().weight.device
        key = token_ids.cpu().numpy().tobytes()
        states = self._states.get(key)
        if states is None:
            states = final_states(self.model, token_ids.to(place))
            if states is None:
                for logits, _ in logit_chunks(self.model, token_ids.to(place), logits_per_chunk):
                    yield logits
                return
            self._states[key] = states.cpu()
        head = self.model.get_output_embeddings().weight.device
        yield from head_chunks(self.model, states.to(head), logits_per_chunk)
