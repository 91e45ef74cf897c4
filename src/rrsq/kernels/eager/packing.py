"""INT4 packing: two codes a byte, laid out so that a kernel reads activations contiguously.

The input channels are cut into blocks of ``b = gcd(in_features, 128)``. In each block byte ``j`` holds the
code of channel ``j`` in its low nibble and that of channel ``j + b/2`` in its high nibble, so that the low
nibbles of ``b/2`` consecutive bytes are ``b/2`` consecutive channels. Nibbles are offset-binary:
``code + 8``, which unpacks with one mask and no sign extension.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "CODE_MAX",
    "CODE_MIN",
    "MULTIPLIER_MAX",
    "NIBBLE_OFFSET",
    "pack_block",
    "pack_int4",
    "unpack_int4",
    "weight_operand",
]

CODE_MIN = -8
CODE_MAX = 7
MULTIPLIER_MAX = 15
"""Largest multiplier of a group of weights: a code times it fits into int8."""
NIBBLE_OFFSET = 8


def pack_block(in_features: int) -> int:
    """Channels in one packing block: ``gcd(in_features, 128)``; ``in_features`` must be even."""
    if in_features < 2 or in_features % 2:
        raise ValueError(f"INT4 packing needs an even number of input channels, got {in_features}")
    return math.gcd(in_features, 128)


def pack_int4(codes: Tensor) -> Tensor:
    """Pack signed codes.

    Args:
        codes: ``[out, in]`` of any integer dtype, every value in [-8, 7].

    Returns:
        uint8 ``[out, in/2]``.

    Raises:
        ValueError: a code is out of range, or ``in`` is odd.
    """
    out_features, in_features = codes.shape
    half = pack_block(in_features) // 2
    if codes.numel() and (int(codes.min()) < CODE_MIN or int(codes.max()) > CODE_MAX):
        raise ValueError(f"codes must lie in [{CODE_MIN}, {CODE_MAX}]")
    nibbles = (codes.to(torch.int16) + NIBBLE_OFFSET).to(torch.uint8).view(out_features, -1, 2, half)
    return (nibbles[:, :, 0] | (nibbles[:, :, 1] << 4)).reshape(out_features, in_features // 2)


def unpack_int4(packed: Tensor) -> Tensor:
    """Undo :func:`pack_int4`: uint8 ``[out, in/2]`` to int8 codes ``[out, in]``."""
    out_features, half_features = packed.shape
    half = pack_block(2 * half_features) // 2
    blocks = packed.view(out_features, -1, 1, half)
    nibbles = torch.cat((blocks & 0xF, blocks >> 4), dim=2)
    return (nibbles.view(torch.int8) - NIBBLE_OFFSET).reshape(out_features, 2 * half_features)


def weight_operand(packed: Tensor, multiplier: Tensor | None) -> Tensor:
    """The int8 right-hand side of the integer GEMM: codes, times the group's multiplier where there is one.

    Args:
        packed: uint8 ``[out, in/2]`` from :func:`pack_int4`.
        multiplier: uint8 ``[out, in/group]`` with values in 1..15, or None.

    Returns:
        int8 ``[out, in]`` in [-120, 105]: exact, since ``|code * multiplier| <= 8 * 15``.
    """
    codes = unpack_int4(packed)
    if multiplier is None:
        return codes
    out_features, in_features = codes.shape
    groups = multiplier.shape[1]
    scaled = codes.view(out_features, groups, -1) * multiplier.view(torch.int8).unsqueeze(-1)
    return scaled.view(out_features, in_features)
