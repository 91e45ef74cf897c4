"""A model's next-token logits a few positions at a time, so that vocabulary times length is never held."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["LOGITS_PER_CHUNK", "final_states", "head_chunks", "logit_chunks"]

# 2**25 float32 logits are 128 MiB: 220 positions of a 152k vocabulary at a time.
LOGITS_PER_CHUNK = 2**25
# Families that change the head's output (Gemma 2, Cohere, Granite, Falcon-H1) need their own forward.
LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


def logit_chunks(
    model: PreTrainedModel, token_ids: Tensor, logits_per_chunk: int = LOGITS_PER_CHUNK
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits ``[positions, vocabulary]`` and the tokens they predict, int64 ``[positions]``.

    Positions run through the windows in order; the last position of a window predicts nothing and is left
    out. Models of one vocabulary size give chunks of one size.

    Args:
        model: runs once over all windows, without a cache.
        token_ids: int64 ``[windows, tokens]`` on the device of the model's embedding.
        logits_per_chunk: positions times vocabulary, at most.
    """
    targets = token_ids[:, 1:].flatten()
    states = final_states(model, token_ids)
    if states is None:
        logits = model(input_ids=token_ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        positions = max(1, logits_per_chunk // logits.shape[-1])
        yield from zip(logits.split(positions), targets.split(positions), strict=True)
        return
    chunks = head_chunks(model, states, logits_per_chunk)
    yield from zip(chunks, targets.split(_positions(model, logits_per_chunk)), strict=True)


def final_states(model: PreTrainedModel, token_ids: Tensor) -> Tensor | None:
    """What the output head reads, ``[windows, tokens, hidden]``.

    None, and nothing is run, where a family's own forward pass makes more of it than the head does.
    """
    if model.get_output_embeddings() is None or _transforms_logits(model):
        return None
    states: Tensor = model.get_decoder()(input_ids=token_ids, use_cache=False).last_hidden_state
    return states


def head_chunks(model: PreTrainedModel, states: Tensor, logits_per_chunk: int) -> Iterator[Tensor]:
    """The logits of :func:`logit_chunks`, of what :func:`final_states` gave."""
    head = model.get_output_embeddings()
    for rows in states[:, :-1].flatten(0, 1).split(_positions(model, logits_per_chunk)):
        yield head(rows)


def _positions(model: PreTrainedModel, logits_per_chunk: int) -> int:
    return max(1, logits_per_chunk // model.config.get_text_config().vocab_size)


def _transforms_logits(model: PreTrainedModel) -> bool:
    config = model.config.get_text_config()
    return any(getattr(config, name, None) is not None for name in LOGIT_TRANSFORMS)
