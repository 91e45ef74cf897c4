"""Random numbers in a model that has no files."""

from __future__ import annotations

from typing import Any

__all__ = ["count_bytes", "fill"]


def fill(model: Any) -> int:
    """Make a model's integers random and its scales small; its bytes come back. Runs in vLLM's workers.

    Products of zeros take less power than others, and so less time.
    """
    import torch

    generators: dict[Any, Any] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        leaf = name.rpartition(".")[2]
        if tensor.device not in generators:
            generators[tensor.device] = torch.Generator(tensor.device).manual_seed(0)
        generator = generators[tensor.device]
        if leaf == "weight_multiplier":
            tensor.random_(1, 16, generator=generator)
        elif leaf == "weight_scale" and tensor.dtype == torch.float32:
            tensor.fill_(1e-3)
        elif leaf.startswith(("weight_packed", "weight_int8", "qweight")) and not tensor.is_floating_point():
            tensor.view(torch.uint8).random_(0, 256, generator=generator)
    return count_bytes(model)


def count_bytes(model: Any) -> int:
    """Bytes of a model's parameters and buffers, those that are shared once. Runs in vLLM's workers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
