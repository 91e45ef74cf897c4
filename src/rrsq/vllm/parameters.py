"""Parameters of vLLM's linears that hold INT4 weights, and how a process takes its part of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
)

from ..kernels.packing import pack_block, pack_int4, unpack_int4

__all__ = [
    "Multipliers",
    "Packed",
    "PartOfWeight",
    "Scales",
    "empty_scales",
    "narrow_groups",
    "narrow_packed",
]


def narrow_packed(packed: Tensor, start: int, channels: int) -> Tensor:
    """A run of input channels of packed codes ``[..., out, in/2]``, packed as a weight of its own."""
    in_features = 2 * packed.shape[-1]
    if pack_block(channels) == pack_block(in_features):
        return packed.narrow(-1, start // 2, channels // 2)
    codes = unpack_int4(packed.reshape(-1, packed.shape[-1])).narrow(1, start, channels)
    return pack_int4(codes).view(*packed.shape[:-1], channels // 2)


def narrow_groups(multiplier: Tensor, start: int, channels: int, parts: int) -> Tensor:
    """The multipliers ``[..., out, groups]`` of a run of input channels, one of ``parts`` equal ones.

    A group that lies in two runs becomes several smaller ones.
    """
    group = parts * channels // multiplier.shape[-1]
    smaller = math.gcd(group, channels)
    if smaller != group:
        multiplier = multiplier.repeat_interleave(group // smaller, -1)
    return multiplier.narrow(-1, start // smaller, channels // smaller)


class _SomeShards(BasevLLMParameter):
    """Holds some of the linears that vLLM fuses, without gaps for the others.

    Attributes:
        rows_before: by the linear's place among the fused ones, rows of others before it that are not here;
            None where all are here.
    """

    rows_before: tuple[int, ...] | None = None

    def load_merged_column_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        super().load_merged_column_weight(loaded_weight, **self._placed(kwargs))

    def load_qkv_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        super().load_qkv_weight(loaded_weight, **self._placed(kwargs))

    def _placed(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        if self.rows_before is None:
            return kwargs
        before = self.rows_before[self._shard_id_as_int(kwargs["shard_id"])]
        return {**kwargs, "shard_offset": kwargs["shard_offset"] - before}


class Packed(_SomeShards, ModelWeightParameter):
    """uint8 ``[out, in/2]``, layout of :mod:`rrsq.kernels.packing`."""

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        channels = 2 * self.data.shape[1]
        self._assert_and_load(narrow_packed(loaded_weight, self.tp_rank * channels, channels))


class Multipliers(_SomeShards, GroupQuantScaleParameter):
    """``[out, in/group]``, uint8 in 1..15 or int8 in ±1..±15; :attr:`channels` are those of this process."""

    channels: int

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        start = self.tp_rank * self.channels
        self._assert_and_load(narrow_groups(loaded_weight, start, self.channels, self.tp_size))


class Scales(_SomeShards, ChannelQuantScaleParameter):
    """float32 ``[out]``; NaN until loaded."""


class PartOfWeight(_SomeShards, ModelWeightParameter):
    """The rows in 16 bits of fused linears of which others are in 4."""


def empty_scales(*shape: int) -> Tensor:
    """What scales are before they are loaded: NaN, which is refused afterwards."""
    return torch.full(shape, float("nan"), dtype=torch.float32)
