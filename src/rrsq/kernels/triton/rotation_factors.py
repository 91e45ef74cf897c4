"""The ±1 matrices that :mod:`.rotation_kernel` multiplies by, made once for each base matrix."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..eager.hadamard import sylvester
from ..eager.rotation import dense_factor
from .rotation_shape import RotationShape

__all__ = ["rotation_factors"]

_Factors = tuple[Tensor, Tensor]
_cache = WeakTensorKeyDictionary()


def rotation_factors(base: Tensor, shape: RotationShape, dtype: torch.dtype) -> _Factors:
    """The dense and the fast factor of a rotation.

    They are kept for as long as ``base`` lives, which must not be changed in place. In a CUDA graph's capture
    factors that are not there yet are not kept either: their memory would be the graph's.

    Args:
        base: ``[k, k]`` of ±1.
        shape: how the rotation is factored.
        dtype: what the products take.

    Returns:
        ``dense`` ``[dense_padded, dense_padded]``, transposed and padded with zeros, and ``fast`` ``[fast,
        fast]``, both in ``dtype``.
    """
    known: dict[tuple[RotationShape, torch.dtype], _Factors] = _cache.setdefault(base, {})
    key = (shape, dtype)
    if key in known:
        return known[key]
    factors = _make(base, shape, dtype)
    if base.device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return factors
        # Other streams may use them from now on.
        torch.cuda.current_stream(base.device).synchronize()
    known[key] = factors
    return factors


def _make(base: Tensor, shape: RotationShape, dtype: torch.dtype) -> _Factors:
    split = shape.split
    mixing = dense_factor(base, split)
    dense = base.new_zeros(shape.dense_padded, shape.dense_padded, dtype=dtype)
    dense[: split.dense, : split.dense] = torch.block_diag(*[mixing.t()] * (split.dense // mixing.shape[0]))
    return dense, sylvester(split.fast, dtype, base.device)
