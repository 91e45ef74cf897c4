"""Streaming calibration text through a model, with one layer and one batch on the device at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...models import LinearInput, ModelFamily
from .layer_calls import embedded, layer_calls
from .precision import calibration_products
from .statistics import InputStatistics

__all__ = ["HiddenStates", "collect_inputs"]


class HiddenStates:
    """The residual stream of all calibration windows between two layers, kept outside of the device.

    Args:
        model: its embedding is on the CPU; its own forward pass says what each layer is called with.
        family: where its parts are.
        windows: int64 ``[samples, tokens]``.
        device: where layers run.
        batch_tokens: tokens run at once.
        dtype: in which the stream is kept.
        allocate: makes the tensor it is kept in, of a shape and a dtype; None for one in memory.
        stream: reads the stream in front of some later layer, which was :attr:`stream` in another run; None
            has the one that enters the first layer computed.

    Attributes:
        stream: ``[samples, tokens, hidden]`` of ``dtype``.
        batches: views of it, in the order they run.
    """

    def __init__(
        self,
        model: nn.Module,
        family: ModelFamily,
        windows: Tensor,
        device: torch.device,
        batch_tokens: int = 4096,
        *,
        dtype: torch.dtype = torch.float32,
        allocate: Callable[[tuple[int, ...], torch.dtype], Tensor | None] = lambda shape, dtype: None,
        stream: Callable[[tuple[int, ...], torch.dtype], Tensor] | None = None,
    ) -> None:
        self.device = device
        embedding: Any = model.get_submodule(family.embedding)
        windows = windows.to(embedding.weight.device)
        parts = windows.split(max(1, batch_tokens // windows.shape[1]))
        with torch.no_grad():  # Gradients may be asked of what layers are called with.
            self._calls = layer_calls(model, family, parts[0][:1], device)
        shape = (*windows.shape, embedding.embedding_dim)
        allocated = allocate(shape, dtype)
        # Page-locked memory is copied to and from a GPU several times as fast.
        pin = device.type == "cuda"
        self.stream = torch.empty(shape, dtype=dtype, pin_memory=pin) if allocated is None else allocated
        self.batches = self.stream.split(len(parts[0]))
        with torch.inference_mode():
            if stream is not None:
                self.stream.copy_(stream(shape, dtype))
                return
            for batch, part in zip(self.batches, parts, strict=True):
                batch.copy_(embedded(model, family, part))

    def on_device(self, batch: Tensor) -> Tensor:
        """One of :attr:`batches` in float32 on the device."""
        return batch.to(self.device).float()

    def run(self, layer: nn.Module, batch: Tensor) -> Tensor:
        """The layer's output for one batch ``[samples, tokens, hidden]``, float32 on the device."""
        with calibration_products(self.device):
            return self.call(layer, self.on_device(batch))

    def call(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """The layer's output for any ``[samples, tokens, hidden]`` on the device, as the model calls it."""
        return self._calls[layer](layer, hidden)

    def observe(self, layer: nn.Module, on_batch: Callable[[], None] = lambda: None) -> Tensor:
        """Run all batches for the hooks' sake; return the first output ``[samples, tokens, hidden]``."""
        first: Tensor | None = None
        with torch.inference_mode():
            for batch in self.batches:
                output = self.run(layer, batch)
                first = output if first is None else first
                on_batch()
        assert first is not None
        return first

    def advance(
        self,
        layer: nn.Module,
        on_batch: Callable[[], None] = lambda: None,
        before_overwrite: Callable[[int], None] = lambda index: None,
    ) -> Tensor:
        """Replace the residual stream by the layer's outputs; return those of the first batch in float32.

        ``before_overwrite`` is called with the index of each batch before its outputs take its place.
        """
        first: Tensor | None = None
        with torch.inference_mode():
            for index, batch in enumerate(self.batches):
                output = self.run(layer, batch)
                before_overwrite(index)
                batch.copy_(output)
                first = output if first is None else first
                on_batch()
        assert first is not None
        return first


@contextmanager
def collect_inputs(
    layer: nn.Module,
    inputs: tuple[LinearInput, ...],
    device: torch.device,
    *,
    with_hessian: bool,
    create: Callable[[LinearInput, int], InputStatistics] | None = None,
) -> Iterator[dict[str, InputStatistics]]:
    """While open, gather statistics of each linear input (after its online rotation), by the input's path.

    ``create`` makes what gathers, from an input and its channels; without it, plain statistics are gathered.
    """
    statistics: dict[str, InputStatistics] = {}
    handles = []
    for entry in inputs:
        linear: Any = layer.get_submodule(entry.linear_paths[0])
        linear = getattr(linear, "linear", linear)
        channels = linear.weight.shape[1]
        if create is None:
            gathered = InputStatistics(channels, device, with_hessian=with_hessian)
        else:
            gathered = create(entry, channels)
        statistics[entry.path] = gathered
        handles.append(linear.register_forward_pre_hook(_input_hook(gathered)))
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()


def _input_hook(statistics: InputStatistics) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        statistics.add(args[0])

    return hook
