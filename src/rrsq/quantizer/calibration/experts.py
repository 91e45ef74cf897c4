"""What calibration text shows each expert of a mixture.

The tokens of a layer's experts are kept on the CPU, with what the router chose, so that statistics can be
taken of a few experts at a time: the Hessians of all experts at once would not fit into memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...runtime.modules.experts import Experts
from .precision import calibration_products
from .statistics import InputStatistics

__all__ = ["RoutedTokens", "collect_routed_tokens", "expert_statistics", "fewest_tokens"]


class RoutedTokens:
    """The inputs of a layer's experts in calibration and the experts that each token went to.

    Attributes:
        hidden: of each batch, float32 ``[tokens, hidden]`` on the CPU.
        chosen: of each batch, int64 ``[tokens, top_k]`` on the CPU.
    """

    def __init__(self) -> None:
        self.hidden: list[Tensor] = []
        self.chosen: list[Tensor] = []

    def add(self, hidden: Tensor, chosen: Tensor) -> None:
        """Keep a batch."""
        self.hidden.append(hidden.detach().float().cpu())
        self.chosen.append(chosen.detach().cpu())

    def counts(self, num_experts: int) -> list[int]:
        """Tokens of each expert."""
        return torch.cat(self.chosen).flatten().bincount(minlength=num_experts).tolist()

    def shown_to(self, expert: int, fewest: int) -> list[Tensor]:
        """Which tokens stand for an expert's inputs: bool ``[tokens]`` of each batch.

        Those that the router sent there; and, where they are fewer than ``fewest``, so many of the others,
        evenly spread over the text, as are missing.
        """
        routed = torch.cat([(chosen == expert).any(1) for chosen in self.chosen])
        others = (~routed).nonzero().squeeze(1)
        missing = min(fewest - (len(routed) - len(others)), len(others))
        if missing > 0:
            routed[others[torch.arange(missing) * len(others) // missing]] = True
        return list(routed.split([len(chosen) for chosen in self.chosen]))


def fewest_tokens(channels: int) -> int:
    """How many tokens an expert must have seen of an input: a quarter of its channels."""
    return -(-channels // 4)


@contextmanager
def collect_routed_tokens(experts: Experts) -> Iterator[RoutedTokens]:
    """While open, keep what the experts are called with."""
    routed = RoutedTokens()

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
    """Statistics of some experts, each of the tokens that :meth:`RoutedTokens.shown_to` it.

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
