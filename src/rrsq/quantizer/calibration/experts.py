"""What calibration text shows each expert of a mixture.

The tokens of a layer's experts are kept on the CPU, with what the router chose, so that statistics can be
taken of a few experts at a time: the Hessians of all experts at once would not fit into memory. Where several
processes share the text, each keeps the tokens of its part, and knows how many the others have.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...runtime.modules.experts import Experts
from .precision import calibration_products
from .statistics import InputStatistics
from .workers import Workers

__all__ = ["RoutedTokens", "collect_routed_tokens", "expert_statistics", "fewest_tokens"]


class RoutedTokens:
    """The inputs of a layer's experts in calibration and the experts that each token went to.

    Args:
        num_experts: of the layer.

    Attributes:
        hidden: of each batch, float32 ``[tokens, hidden]`` on the CPU.
        chosen: of each batch, int64 ``[tokens, top_k]`` on the CPU, no expert twice for a token.
        energy: ``Σ x²`` of each channel, float32 ``[hidden]`` where the layer runs; None before any token.
        counts: tokens of each expert, int64 ``[processes, experts]``; of one process until :meth:`merge`.
        tokens: in all, int64 ``[processes]``.
        rank: this process's row of these.
    """

    def __init__(self, num_experts: int) -> None:
        self.hidden: list[Tensor] = []
        self.chosen: list[Tensor] = []
        self.energy: Tensor | None = None
        self.counts = torch.zeros(1, num_experts, dtype=torch.int64)
        self.tokens = torch.zeros(1, dtype=torch.int64)
        self.rank = 0

    def add(self, hidden: Tensor, chosen: Tensor) -> None:
        """Keep a batch."""
        hidden, chosen = hidden.detach().float(), chosen.detach().cpu()
        energy = hidden.square().sum(0)
        self.energy = energy if self.energy is None else self.energy + energy
        self.hidden.append(hidden.cpu())
        self.chosen.append(chosen)
        self.counts[0] += chosen.flatten().bincount(minlength=self.counts.shape[1])
        self.tokens[0] += len(chosen)

    def merge(self, workers: Workers) -> None:
        """Learn of the other processes' tokens, when all are kept: their counts and their energy."""
        assert self.energy is not None
        self.counts, self.tokens = workers.gather(self.counts[0]), workers.gather(self.tokens[0])
        self.rank = workers.rank
        workers.add_up(self.energy)

    def scale(self, factor: Tensor) -> None:
        """Multiply the channels by ``[hidden]``, as the norm in front of the experts is."""
        on_cpu = factor.cpu()
        self.hidden = [hidden * on_cpu for hidden in self.hidden]
        if self.energy is not None:
            self.energy = self.energy * factor.square()

    def shown_to(self, expert: int, fewest: int) -> list[Tensor]:
        """Which tokens stand for an expert's inputs: bool ``[tokens]`` of each batch.

        Those that the router sent there; and, where they are fewer than ``fewest`` in all processes, so many
        of the others, evenly spread over the whole text, as are missing.
        """
        routed = torch.cat([(chosen == expert).any(1) for chosen in self.chosen])
        others = self.tokens - self.counts[:, expert]
        missing = min(fewest - int(self.counts[:, expert].sum()), int(others.sum()))
        if missing > 0:
            # Of all others by number, this process's follow those of the ranks before it.
            spread = torch.arange(missing) * others.sum() // missing - others[: self.rank].sum()
            own = spread[(spread >= 0) & (spread < others[self.rank])]
            routed[(~routed).nonzero().squeeze(1)[own]] = True
        return list(routed.split([len(chosen) for chosen in self.chosen]))


def fewest_tokens(channels: int) -> int:
    """How many tokens an expert must have seen of an input: a quarter of its channels."""
    return -(-channels // 4)


@contextmanager
def collect_routed_tokens(experts: Experts) -> Iterator[RoutedTokens]:
    """While open, keep what the experts are called with."""
    routed = RoutedTokens(experts.num_experts)

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        routed.add(args[0], args[1])

    handle = experts.register_forward_pre_hook(keep)
    try:
        yield routed
    finally:
        handle.remove()


def expert_statistics(
    experts: Experts, routed: RoutedTokens, selected: range, device: torch.device, *, with_hessian: bool
) -> dict[int, dict[str, InputStatistics]]:
    """Statistics of some experts, each of this process's tokens that are :meth:`RoutedTokens.shown_to` it.

    Args:
        experts: in full precision, rotated.
        routed: the tokens of the layer.
        selected: which experts.
        device: where they are, and the statistics will be.
        with_hessian: False skips the Hessians.

    Returns:
        By expert, those of the inputs ``gate_up`` and ``down``.
    """
    hidden, inner = experts.gate_up_proj.weight.shape[-1], experts.down_proj.weight.shape[-1]
    of_gate_up = {expert: routed.shown_to(expert, fewest_tokens(hidden)) for expert in selected}
    of_down = {expert: routed.shown_to(expert, fewest_tokens(inner)) for expert in selected}
    found = {
        expert: {
            "gate_up": InputStatistics(hidden, device, with_hessian=with_hessian),
            "down": InputStatistics(inner, device, with_hessian=with_hessian),
        }
        for expert in selected
    }
    with torch.inference_mode(), calibration_products(device):
        for index, batch in enumerate(routed.hidden):
            x = batch.to(device)
            for expert, statistics in found.items():
                tokens = x[of_gate_up[expert][index].to(device)]
                statistics["gate_up"].add(experts.input_of_gate_up(tokens))
                tokens = x[of_down[expert][index].to(device)]
                statistics["down"].add(experts.input_of_down(tokens, expert))
    return found
