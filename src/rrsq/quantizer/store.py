"""Where a model's weights come from and where finished layers go: the pipeline asks for one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from .checks import check_finite
from .memory import weight_bytes
from .outcome import LayerReport

__all__ = ["InMemoryStore", "ModelStore", "Progressed"]


class Progressed(Protocol):
    """What an earlier run of the same quantization finished."""

    layers: list[LayerReport]

    def stream(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The residual stream behind the last finished layer."""


class ModelStore(Protocol):
    """The weights of the model that is being quantized.

    Attributes:
        progressed: what need not be done again; None at the beginning.
        bytes_before: size of the weights of the original model.
    """

    progressed: Progressed | None
    bytes_before: int

    def check(self) -> None:
        """Refuse weights that are NaN or infinite, before anything is done with them."""

    def open(self, path: str) -> None:
        """Give the module at ``path`` its original weights."""

    def close(self, path: str) -> None:
        """The module at ``path`` is finished."""

    def drop(self, path: str) -> None:
        """The module at ``path``, opened, was only looked at."""

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Memory for the residual stream, or None for ordinary one."""

    def before_overwrite(self, index: int) -> None:
        """The batch of this index of the residual stream is about to be overwritten."""

    def commit(self, report: LayerReport | None, stream: Sequence[Tensor]) -> None:
        """A layer is finished (None: the embedding), and the residual stream, in batches, is behind it."""

    def bytes_after(self) -> int:
        """Size of the weights of the quantized model."""


class InMemoryStore:
    """A model that is in memory as a whole, and stays there."""

    progressed: Progressed | None = None

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.bytes_before = weight_bytes(model)

    def check(self) -> None:
        """See :class:`ModelStore`."""
        check_finite(self.model)

    def open(self, path: str) -> None:
        """Nothing: the weights are there."""

    def close(self, path: str) -> None:
        """Nothing: the weights stay."""

    def drop(self, path: str) -> None:
        """Nothing."""

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Ordinary memory."""
        return None

    def before_overwrite(self, index: int) -> None:
        """Nothing: no one else reads the stream."""

    def commit(self, report: LayerReport | None, stream: Sequence[Tensor]) -> None:
        """Nothing: what is in memory is lost with the process."""

    def bytes_after(self) -> int:
        """See :class:`ModelStore`."""
        return weight_bytes(self.model)
