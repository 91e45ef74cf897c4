"""How a quantization is carried out, where a recipe says what it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .calibration.workers import ALONE, Workers
from .experts import HESSIAN_BYTES

__all__ = ["DEFAULTS", "QuantizationOptions"]


@dataclass(frozen=True)
class QuantizationOptions:
    """How a quantization is carried out.

    Attributes:
        seed: of the rotations' random signs.
        device: where layers are computed.
        workers: processes that share the calibration text, each is given all of it and runs its part, and
            the rounding of experts.
        hessian_bytes: of experts, only so many are quantized at once as have Hessians of so many bytes.
        stream_dtype: in which the residual stream of the calibration text is kept between layers.
    """

    seed: int = 0
    device: str = "cpu"
    workers: Workers = ALONE
    hessian_bytes: int = HESSIAN_BYTES
    stream_dtype: torch.dtype = torch.bfloat16


DEFAULTS = QuantizationOptions()
