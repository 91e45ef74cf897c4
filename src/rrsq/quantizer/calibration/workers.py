"""Processes that share calibration: each runs a part of the text, and their statistics are added up.

Started by ``torchrun``, one process a GPU. Sums of floating-point numbers depend on their order, so several
processes give Hessians that differ from one process's in the last bits.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import UsageError
from .statistics import InputStatistics, MeanStatistics

__all__ = ["ALONE", "Workers", "is_first_process", "joined_workers"]


@dataclass(frozen=True)
class Workers:
    """This process among those that work together.

    Attributes:
        rank: its number; 0 writes the result.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    def part(self, windows: Tensor) -> Tensor:
        """This process's windows of ``[samples, tokens]``: a run of them, the first ones for rank 0.

        Raises:
            UsageError: there are fewer windows than processes.
        """
        if len(windows) < self.count:
            raise UsageError(
                f"{self.count} processes cannot share {len(windows)} calibration windows. Start fewer, or"
                " give a larger --num-samples."
            )
        return windows.tensor_split(self.count)[self.rank]

    def merge(self, statistics: Iterable[InputStatistics | MeanStatistics]) -> None:
        """Give every process the statistics of all the text."""
        if self.count == 1:
            return
        from torch import distributed

        for each in statistics:
            tokens = torch.tensor(float(each.tokens), dtype=torch.float64)
            sums: list[Tensor] = []
            largest: list[Tensor] = []
            if isinstance(each, InputStatistics):
                sums, largest = [] if each.hessian is None else each.hessian.parts, [each.absmax]
            elif each.total is not None:
                sums = [each.total]
            tokens = tokens.to((*largest, *sums)[0].device)
            for tensor in (*sums, tokens):
                distributed.all_reduce(tensor)
            for tensor in largest:
                distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
            each.tokens = int(tokens)

    def share(self, module: nn.Module) -> None:
        """Give every process the tensors of rank 0's module."""
        if self.count == 1:
            return
        from torch import distributed

        for tensor in module.state_dict().values():
            distributed.broadcast(tensor, 0)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            from torch import distributed

            distributed.barrier()


ALONE = Workers()


def is_first_process() -> bool:
    """Whether this process, of those that ``torchrun`` started, is the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def joined_workers(device: torch.device) -> Iterator[Workers]:
    """The processes that ``torchrun`` started, this one among them; this one alone without it.

    On CUDA each process takes the GPU of its number on its machine.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    from torch import distributed

    if device.type == "cuda":
        own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(own)
        distributed.init_process_group("nccl", device_id=own)
    else:
        distributed.init_process_group("gloo")
    try:
        yield Workers(distributed.get_rank(), count)
    finally:
        distributed.destroy_process_group()
