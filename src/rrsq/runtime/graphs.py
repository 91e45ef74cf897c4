"""CUDA graphs of a forward pass: what may be captured, and how."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CapturedGraph", "GraphPool", "asks_for_more", "can_capture", "structure_of"]

_capturing = threading.Lock()
_OURS = ("rrsq.runtime.", "transformers.")


def can_capture(device: torch.device) -> bool:
    """Whether there are graphs on a device, and no capture is under way, which would take in a replay."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def asks_for_more(kwargs: dict[str, Any], known: Collection[str]) -> bool:
    """Whether a forward pass is given an argument that is not known, and is not empty."""
    return any(
        name not in known and value is not None and (isinstance(value, Tensor) or bool(value))
        for name, value in kwargs.items()
    )


def structure_of(model: nn.Module) -> tuple[Any, ...] | None:
    """What a forward pass runs: modules and their hooks.

    None where there are hooks of somebody else. Python does not run when a graph is replayed.
    """
    structure = []
    for module in model.modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        if hooks and not all(
            (getattr(hook, "__module__", None) or "").startswith(_OURS)
            for registered in (module._forward_hooks, module._forward_pre_hooks)
            for hook in registered.values()
        ):
            return None
        structure.append((id(module), hooks))
    return tuple(structure)


class GraphPool:
    """Memory that several graphs work in, of which one runs at a time."""

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()
        self._ended = torch.cuda.Event()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """What is launched in it runs behind earlier turns, on whatever streams. For one thread at a time."""
        stream = torch.cuda.current_stream()
        stream.wait_event(self._ended)
        try:
            yield
        finally:
            self._ended.record(stream)


class CapturedGraph:
    """The kernels that a function launches, without gradients.

    Args:
        function: of no arguments; all that it has to compile is compiled. It may not wait for the GPU.
        pool: for what it allocates; None: memory of its own.

    Attributes:
        result: of the function, which each :meth:`replay` writes to.

    Raises:
        RuntimeError: it does what cannot be captured.
    """

    def __init__(self, function: Callable[[], Any], pool: GraphPool | None = None) -> None:
        self._graph = torch.cuda.CUDAGraph()
        handle = None if pool is None else pool.handle
        # Replays write to tensors of the capture, and may be in another mode.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            _capturing,
            torch.cuda.graph(self._graph, pool=handle, capture_error_mode="thread_local"),
        ):
            self.result = function()

    def replay(self) -> None:
        """Launch the kernels once more."""
        self._graph.replay()
