"""Streaming calibration text through a model, with one layer and one batch on the device at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..models import LinearInput, ModelFamily
from .statistics import InputStatistics, MeanStatistics

__all__ = ["HiddenStates", "collect_inputs", "collect_means"]


class HiddenStates:
    """The residual stream of all calibration windows between two layers, kept on the CPU in float32.

    Args:
        model: supplies the embedding and the rotary embedding.
        family: where they are.
        windows: int64 ``[samples, tokens]``.
        device: where layers run.
        batch_tokens: tokens run at once.
    """

    def __init__(
        self,
        model: nn.Module,
        family: ModelFamily,
        windows: Tensor,
        device: torch.device,
        batch_tokens: int = 4096,
    ) -> None:
        self.device = device
        batch = max(1, batch_tokens // windows.shape[1])
        embedding: Any = model.get_submodule(family.embedding)
        with torch.inference_mode():
            parts = windows.to(embedding.weight.device).split(batch)
            self.batches = [embedding(part).float().cpu() for part in parts]
        self._rotary = model.get_submodule(family.rotary)
        # Other attention implementations are causal by themselves when they get no mask.
        self._needs_mask = getattr(model.config, "_attn_implementation", None) == "eager"

    def run(self, layer: nn.Module, batch: Tensor) -> Tensor:
        """The layer's output for one batch ``[samples, tokens, hidden]``, on the device."""
        hidden = batch.to(self.device)
        positions = torch.arange(hidden.shape[1], device=self.device).unsqueeze(0)
        angles = self._rotary.to(self.device)(hidden, position_ids=positions)
        output: Any = layer(
            hidden,
            attention_mask=_causal_mask(hidden) if self._needs_mask else None,
            position_ids=positions,
            past_key_values=None,
            use_cache=False,
            position_embeddings=angles,
        )
        return output[0] if isinstance(output, tuple) else output

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

    def advance(self, layer: nn.Module, on_batch: Callable[[], None] = lambda: None) -> Tensor:
        """Replace the residual stream by the layer's outputs; return those of the first batch."""
        with torch.inference_mode():
            for i, batch in enumerate(self.batches):
                self.batches[i] = self.run(layer, batch).cpu()
                on_batch()
        return self.batches[0].to(self.device)


def _causal_mask(hidden: Tensor) -> Tensor:
    """What is added to attention scores: ``[1, 1, tokens, tokens]``, minus infinity above the diagonal."""
    tokens = hidden.shape[1]
    return torch.full((1, 1, tokens, tokens), -torch.inf, dtype=hidden.dtype, device=hidden.device).triu(1)


@contextmanager
def collect_inputs(
    layer: nn.Module, inputs: tuple[LinearInput, ...], device: torch.device, *, with_hessian: bool
) -> Iterator[dict[str, InputStatistics]]:
    """While open, gather statistics of each linear input (after its online rotation), by input name."""
    statistics: dict[str, InputStatistics] = {}
    handles = []
    for entry in inputs:
        linear: Any = layer.get_submodule(f"{entry.parent}.{entry.linears[0]}")
        linear = getattr(linear, "linear", linear)
        gathered = InputStatistics(linear.weight.shape[1], device, with_hessian=with_hessian)
        statistics[entry.name] = gathered
        handles.append(linear.register_forward_pre_hook(_input_hook(gathered)))
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def collect_means(modules: dict[str, nn.Module]) -> Iterator[dict[str, MeanStatistics]]:
    """While open, gather the mean output of each module, by its given name."""
    statistics = {name: MeanStatistics() for name in modules}
    handles = [
        module.register_forward_hook(_output_hook(statistics[name])) for name, module in modules.items()
    ]
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()


def _input_hook(statistics: InputStatistics) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        statistics.add(args[0])

    return hook


def _output_hook(statistics: MeanStatistics) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        statistics.add(output)

    return hook
