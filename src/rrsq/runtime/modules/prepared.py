"""What a module keeps to multiply by the same weight again and again."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ...kernels.operation import FEW_TOKENS, forced_backend

__all__ = ["Prepared", "QuantizedWeight"]

_Kept = TypeVar("_Kept")


class Prepared(dict[tuple[torch.Size | int, torch.dtype, str | None], _Kept]):
    """What runs activations: by dtype, forced backend and their shape, or the channels of many tokens.

    So there are few, and a call of few tokens costs one look.
    """

    def find(self, x: Tensor, make: Callable[[Tensor], _Kept]) -> _Kept:
        """What runs activations like ``x`` ``[..., channels]``, not empty; made where it is not there.

        It is not kept while a CUDA graph is captured: the memory of its tensors would be the graph's.
        """
        shape, dtype, backend = x.shape, x.dtype, forced_backend()
        kept = self.get((shape, dtype, backend))
        if kept is None:
            size = shape if x.numel() <= FEW_TOKENS * shape[-1] else shape[-1]
            kept = self.get((size, dtype, backend))
            if kept is None:
                kept = make(x)
                if not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
                    self[size, dtype, backend] = kept
        return kept


class QuantizedWeight(nn.Module):
    """Integer codes with float32 scales, and what is derived from them.

    Attributes:
        codes: name of the buffer that has the codes.
        weight_scale: float32, whatever dtype the model is cast to.
    """

    codes: ClassVar[str]
    weight_scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._forget()

    def _forget(self) -> None:
        """What is derived from the weight is made anew."""
        self._operand: Tensor | None = None
        self._seen: weakref.ref[Tensor] | None = None
        self._prepared_for: Tensor | None = None
        self._unprepare()

    def _unprepare(self) -> None:
        """What runs is chosen anew."""
        self._prepared = Prepared[Any]()

    def _stays(self) -> bool:
        """Whether the weight was there at the last call: another may be gone at the next (offloading)."""
        codes = self._buffers[self.codes]
        assert codes is not None
        if self._prepared_for is codes:
            return True
        known = self._seen is not None and self._seen() is codes
        if known:
            self._prepared_for = codes
            self._unprepare()
        else:
            self._forget()
            self._seen = weakref.ref(codes)
        return known

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes its own unpacked weight, and does not carry the tensor that its linears share.
        buffers = {name: None if x is None else x.clone() for name, x in self._buffers.items()}
        forgotten = {"_operand": None, "_seen": None, "_prepared_for": None, "_prepared": Prepared[Any]()}
        return {**self.__dict__, **forgotten, "_buffers": buffers}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # What is derived belongs to the old device.
        self._forget()
        scale = self.weight_scale
        module = super()._apply(fn, recurse)
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale = scale.to(self.weight_scale.device)
        return module

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)
