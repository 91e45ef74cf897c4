"""Processes that share calibration: each runs a part of the text, and their statistics are added up.

Started by ``torchrun``, one process a GPU. Sums of floating-point numbers depend on their order, so several
processes give Hessians that differ from one process's in the last bits.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UsageError
from .statistics import InputStatistics, MeanStatistics

__all__ = ["ALONE", "Workers", "is_first_process", "joined_workers"]

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Workers:
    """This process among those that work together.

    Attributes:
        rank: its number; 0 writes the result.
        count: how many there are.
        device: where it computes.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = _CPU

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

    def owner(self, number: int) -> int:
        """The rank that does a piece of work of this number, where each piece is done by one."""
        return number % self.count

    def merge(self, statistics: Iterable[InputStatistics | MeanStatistics], owner: int | None = None) -> None:
        """Give every process the statistics of all the text.

        With ``owner`` only the process of that rank has them then, and what the others have is of no use.
        """
        if self.count == 1:
            return
        for each in statistics:
            tokens = torch.tensor(float(each.tokens), dtype=torch.float64, device=self.device)
            sums: list[Tensor] = []
            if isinstance(each, InputStatistics):
                sums = [] if each.hessian is None else each.hessian.parts
                self.largest(each.absmax, owner)
            elif each.total is not None:
                sums = [each.total]
            for tensor in (*sums, tokens):
                self.add_up(tensor, owner)
            each.tokens = int(tokens)

    def add_up(self, tensor: Tensor, owner: int | None = None) -> None:
        """Replace a tensor on the device by the sum of all processes', for all of them or for one."""
        if self.count > 1:
            from torch import distributed

            _reduce(tensor, distributed.ReduceOp.SUM, owner)

    def largest(self, tensor: Tensor, owner: int | None = None) -> None:
        """Replace a tensor on the device by the elementwise maximum, for all processes or for one."""
        if self.count > 1:
            from torch import distributed

            _reduce(tensor, distributed.ReduceOp.MAX, owner)

    def gather(self, tensor: Tensor) -> Tensor:
        """All processes' tensors of one shape: ``[count, *shape]``, where the tensor is."""
        if self.count == 1:
            return tensor.unsqueeze(0)
        from torch import distributed

        own = tensor.to(self.device)
        found = [torch.empty_like(own) for _ in range(self.count)]
        distributed.all_gather(found, own)
        return torch.stack(found).to(tensor.device)

    def all(self, fact: bool) -> bool:
        """Whether something is so in all processes."""
        return bool(self.gather(torch.tensor(int(fact))).all())

    def give(self, tensors: Iterable[Tensor], owner: int) -> None:
        """Give every process one's tensors, on the device, in the place of its own."""
        if self.count == 1:
            return
        from torch import distributed

        for tensor in tensors:
            distributed.broadcast(tensor, owner)

    def share(self, module: nn.Module) -> None:
        """Give every process the tensors of rank 0's module."""
        self.give(module.state_dict().values(), 0)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            from torch import distributed

            distributed.barrier()


ALONE = Workers()


def _reduce(tensor: Tensor, operation: Any, owner: int | None) -> None:
    """For all processes, or for one."""
    from torch import distributed

    if owner is None:
        distributed.all_reduce(tensor, operation)
    else:
        distributed.reduce(tensor, owner, operation)


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
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        distributed.init_process_group("nccl", device_id=device)
    else:
        distributed.init_process_group("gloo")
    try:
        yield Workers(distributed.get_rank(), count, device)
    finally:
        distributed.destroy_process_group()
