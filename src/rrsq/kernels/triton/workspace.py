"""Memory for kernels that split a sum over programs, which leave their parts there and count who has arrived.

Counters are zero before every launch, and left at zero by every launch.

Calls on one stream follow each other, so they share one buffer a stream. A call that is captured in a CUDA
graph may be replayed at any time: it gets counters of its own from a reserve that is allocated outside of
capture. Where the reserve is used up, or missing because nothing ran before the capture, the graph clears its
own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .plans import FusedPlan

__all__ = ["MAXIMUM_COUNTERS", "counters", "split_sums"]

MAXIMUM_COUNTERS = 4096
_RESERVE = 1 << 20
_by_stream: dict[tuple[torch.device, int], Tensor] = {}
_reserves: dict[torch.device, tuple[Tensor, int]] = {}


def counters(count: int, device: torch.device) -> Tensor:
    """``count`` (at most :data:`MAXIMUM_COUNTERS`) zero int32 for one launch on the current stream."""
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        reserve, used = _reserves.get(device, (None, _RESERVE))
        if reserve is None or used + count > _RESERVE:
            return torch.zeros(count, dtype=torch.int32, device=device)
        _reserves[device] = (reserve, used + count)
        return reserve[used : used + count]
    if device not in _reserves:
        _reserves[device] = (torch.zeros(_RESERVE, dtype=torch.int32, device=device), 0)
        torch.cuda.current_stream(device).synchronize()
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _by_stream:
        _by_stream[key] = torch.zeros(MAXIMUM_COUNTERS, dtype=torch.int32, device=device)
    return _by_stream[key]


def split_sums(
    plan: FusedPlan, tiles: int, row_bytes: int, dtype: torch.dtype, unused: Tensor
) -> tuple[int, Tensor, Tensor]:
    """How many programs share a tile's sum over K, the room for their parts, and the tiles' counters.

    Args:
        plan: asks for ``plan.split``; there are no more parts than steps of K.
        tiles: number of tiles.
        row_bytes: packed bytes of a weight row.
        dtype: of the sums.
        unused: on the device; stands for both where nothing is split.
    """
    split = min(plan.split, -(-row_bytes // plan.block_bytes))
    if split == 1 or tiles > MAXIMUM_COUNTERS:
        return 1, unused, unused
    size = tiles * split * plan.block_out * plan.block_tokens
    return split, torch.empty(size, dtype=dtype, device=unused.device), counters(tiles, unused.device)
