"""A symmetric matrix in half the space: its upper triangle, row by row."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack_symmetric", "packed_size", "unpack_symmetric"]


def packed_size(channels: int) -> int:
    """Elements of the upper triangle of a ``[channels, channels]`` matrix."""
    return channels * (channels + 1) // 2


def pack_symmetric(matrix: Tensor) -> Tensor:
    """The upper triangle, diagonal included, of a symmetric ``[n, n]``: ``[n (n + 1) / 2]`` on the CPU."""
    matrix = matrix.cpu()
    return matrix[_upper(matrix.shape[0])]


def unpack_symmetric(packed: Tensor, channels: int) -> Tensor:
    """The symmetric ``[channels, channels]`` of a triangle that :func:`pack_symmetric` made."""
    matrix = packed.new_zeros(channels, channels)
    matrix[_upper(channels)] = packed
    return matrix + matrix.triu(1).t()


def _upper(channels: int) -> Tensor:
    return torch.ones(channels, channels, dtype=torch.bool).triu_()
