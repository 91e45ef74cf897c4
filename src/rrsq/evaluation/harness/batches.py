"""How many questions to run at a time: as many as the free memory surely holds."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch
from transformers import PreTrainedModel

from rrsq.runtime.modules.input import InputQuantizer

__all__ = ["plan_batches", "token_budget", "tokens_share_scales"]

# More tokens than this in one batch do not make it faster.
MOST_TOKENS = {"cuda": 32768, "cpu": 2048}
# Of the memory that is free; the rest is for what the estimate leaves out and for other processes.
SHARE = 0.5


def token_budget(model: PreTrainedModel) -> int:
    """Tokens, padding included, that a batch may have on the model's device."""
    device = model.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available
    most = MOST_TOKENS.get(device.type, MOST_TOKENS["cpu"])
    return max(1, min(most, int(SHARE * free / _bytes_per_token(model))))


def _bytes_per_token(model: PreTrainedModel) -> int:
    """Roughly what a token needs in one forward pass: logits, their log-softmax, and the widest layer."""
    config = model.config.get_text_config()
    logits = 2 * config.vocab_size * model.dtype.itemsize
    intermediate = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    # Quantized layers compute in float32 on the way.
    return logits + 4 * (4 * intermediate + 8 * config.hidden_size)


def tokens_share_scales(model: torch.nn.Module) -> bool:
    """Whether a token's quantization depends on the other tokens of a call: then a batch, and the padding in
    it, would change the results."""
    return any(
        isinstance(module, InputQuantizer)
        and module.scheme.group_size is not None
        and (module.scheme.scope != "token" or module.scheme.simulated)
        for module in model.modules()
    )


def plan_batches(lengths: Sequence[int], budget: int) -> list[int]:
    """Cut requests into consecutive batches of at most ``budget`` tokens with padding, one request at least.

    Args:
        lengths: tokens of each request, falling.
        budget: tokens.

    Returns:
        For each request the size of the batch it is in.
    """
    plan: list[int] = []
    while len(plan) < len(lengths):
        longest = lengths[len(plan)]
        size = min(max(1, budget // max(1, longest)), len(lengths) - len(plan))
        plan += [size] * size
    return plan
