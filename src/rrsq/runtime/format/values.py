"""Checking the numbers of a loaded checkpoint: kernels would make wrong text of wrong ones without a word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CheckpointError
from ...kernels.packing import MULTIPLIER_MAX

__all__ = ["check_values"]


def check_values(model: nn.Module) -> None:
    """Refuse tensors that hold what no quantization makes.

    Tensors on the meta device (offloaded ones) are passed over.

    Raises:
        CheckpointError: a number is NaN or infinite, a scale is not positive, a multiplier is not in 1..15, a
            channel order is no permutation, or a sign is not ±1.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_meta or not tensor.numel():
            continue
        leaf = name.rsplit(".", 1)[-1]
        holds, what = _RULES.get(leaf, (_finite, "NaN or Inf"))
        if not bool(holds(tensor)):
            raise CheckpointError(
                f"Tensor '{name}' of the checkpoint holds {what}. Copy the checkpoint again, or quantize the"
                " model again."
            )


def _finite(tensor: Tensor) -> Any:
    if not tensor.is_floating_point():
        return True
    least, most = torch.aminmax(tensor)  # Without a copy of the tensor; NaN is handed on.
    return torch.isfinite(least) & torch.isfinite(most)


def _positive(tensor: Tensor) -> Any:
    least, most = torch.aminmax(tensor)
    return (least > 0) & torch.isfinite(most)


def _multiplier(tensor: Tensor) -> Any:
    least, most = torch.aminmax(tensor)
    return (least >= 1) & (most <= MULTIPLIER_MAX)


def _permutation(tensor: Tensor) -> Any:
    return (tensor.sort().values == torch.arange(tensor.numel(), device=tensor.device)).all()


def _signs(tensor: Tensor) -> Any:
    return (tensor.abs() == 1).all()


_RULES: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "weight_scale": (_positive, "a scale that is not a positive finite number"),
    "weight_multiplier": (_multiplier, f"a multiplier that is not in 1..{MULTIPLIER_MAX}"),
    "channel_order": (_permutation, "an order of channels that is no permutation"),
    "residual_signs": (_signs, "a sign that is neither 1 nor -1"),
    "head_signs": (_signs, "a sign that is neither 1 nor -1"),
}
