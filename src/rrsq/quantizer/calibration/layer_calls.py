"""What a model calls its decoder layers with: the residual stream, masks, positions, rotary angles.

The model's own forward pass is asked, with recorders in the place of its layers. So scaled embeddings,
learned positions, sliding windows and rotary angles that differ by layer need no description.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...models import ModelFamily

__all__ = ["LayerCall", "embedded", "layer_calls", "with_causal_masks"]


@dataclass(frozen=True)
class LayerCall:
    """The arguments of a decoder layer behind the residual stream."""

    args: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """The layer's output for ``hidden`` ``[samples, tokens, hidden]``."""
        output: Any = layer(hidden, *self.args, **self.options)
        return output[0] if isinstance(output, tuple) else output


class _Recorder(nn.Module):
    """Stands where a decoder layer was: keeps what it is called with and returns the stream as it came."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.empty(0)
        self.call = LayerCall()

    def forward(self, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
        self.hidden, self.call = hidden_states, LayerCall(args, options)
        return hidden_states


def embedded(model: nn.Module, family: ModelFamily, windows: Tensor) -> Tensor:
    """The stream that enters the first layer, float32 ``[samples, tokens, hidden]``."""
    with _recorders(model, family) as recorders:
        _run(model, family, windows)
    return recorders[0].hidden


def layer_calls(
    model: nn.Module, family: ModelFamily, window: Tensor, device: torch.device
) -> dict[nn.Module, LayerCall]:
    """How each layer is called for a window ``[1, tokens]``, which holds for any batch of its length.

    Tensors are on ``device``; layers that are called with the same tensor share it. On CUDA a causal mask is
    written out where the model leaves it to its attention function: without one, grouped queries in float32
    take a function that makes the scores of all heads, several times.
    """
    layers: Any = model.get_submodule(family.layers)
    with _recorders(model, family) as recorders:
        _run(model, family, window)
    moved: dict[int, Tensor] = {}
    calls = {
        layer: LayerCall(
            _move(recorder.call.args, device, moved), _move(recorder.call.options, device, moved)
        )
        for layer, recorder in zip(layers, recorders, strict=True)
    }
    config: Any = model.config
    if device.type != "cuda" or config._attn_implementation != "sdpa":
        return calls
    return with_causal_masks(calls, window.shape[1], device)


def with_causal_masks(
    calls: dict[nn.Module, LayerCall], tokens: int, device: torch.device
) -> dict[nn.Module, LayerCall]:
    """The same calls, with a causal mask, bool ``[1, 1, tokens, tokens]``, where there was none."""
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril_()[None, None]
    return {
        layer: LayerCall(call.args, {**call.options, "attention_mask": mask})
        if call.options.get("attention_mask", mask) is None
        else call
        for layer, call in calls.items()
    }


@contextmanager
def _recorders(model: nn.Module, family: ModelFamily) -> Iterator[list[_Recorder]]:
    """Put recorders in the place of the layers, and nothing in that of the final norm, for a while."""
    replaced = {path: model.get_submodule(path) for path in (family.layers, family.final_norm)}
    layers: Any = replaced[family.layers]
    recorders = [_Recorder() for _ in layers]
    model.set_submodule(family.layers, nn.ModuleList(recorders))
    model.set_submodule(family.final_norm, nn.Identity())
    try:
        yield recorders
    finally:
        for path, module in replaced.items():
            model.set_submodule(path, module)


def _run(model: nn.Module, family: ModelFamily, windows: Tensor) -> None:
    # From float32 embeddings the model makes float32 masks and angles, whatever its own dtype is.
    embeddings = model.get_submodule(family.embedding)(windows).float()
    model.get_submodule(family.decoder)(inputs_embeds=embeddings, use_cache=False)


def _move(value: Any, device: torch.device, moved: dict[int, Tensor]) -> Any:
    if isinstance(value, tuple):
        return tuple(_move(part, device, moved) for part in value)
    if isinstance(value, dict):
        return {key: _move(part, device, moved) for key, part in value.items()}
    if not isinstance(value, Tensor):
        return value
    if id(value) not in moved:
        moved[id(value)] = value.to(device)
    return moved[id(value)]
