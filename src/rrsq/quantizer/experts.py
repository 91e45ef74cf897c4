"""Quantizing a mixture of experts: each expert by itself, with the Hessians of a few of them at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..models import LinearInput
from ..recipe import Weights
from ..runtime.assemble import quantize_input_modules
from ..runtime.modules.experts import Experts
from ..runtime.modules.linear import PackedWeight
from ..runtime.rotation.rotations import Rotations
from ..runtime.scheme import Treatment
from .calibration.experts import RoutedTokens, expert_statistics, fewest_tokens
from .calibration.statistics import InputStatistics
from .calibration.workers import ALONE, Workers
from .weights import in_order, quantize_weight

__all__ = ["HESSIAN_BYTES", "ExpertsReport", "batches_of_experts", "quantize_experts"]

HESSIAN_BYTES = 4 * 2**30


@dataclass
class ExpertsReport:
    """What happened to a layer's experts.

    Attributes:
        fallbacks: inputs whose weights were rounded to nearest, as ``mlp.experts.3.down``.
        undersampled: experts that saw fewer tokens than their Hessians need.
    """

    fallbacks: list[str] = field(default_factory=list)
    undersampled: list[int] = field(default_factory=list)

    def messages(self, layer_index: int) -> list[str]:
        """What a user should know, in words."""
        found = []
        if self.undersampled:
            found.append(
                f"Layer {layer_index}: the router sent few tokens (fewer than a quarter of an input's"
                f" channels) to the experts {', '.join(map(str, self.undersampled))}; tokens of other experts"
                " were used as well. More calibration text (--num-samples) helps."
            )
        if self.fallbacks:
            found.append(
                f"Layer {layer_index}, {', '.join(self.fallbacks)}: the Hessian could not be factored even"
                " with 1000 times the damping; these weights were rounded to nearest."
            )
        return found


def batches_of_experts(num_experts: int, channels: list[int], hessian_bytes: int) -> list[range]:
    """Cut the experts into runs whose Hessians fit into the bytes; a run has one expert at least.

    Args:
        num_experts: how many there are.
        channels: of each input of an expert; its Hessian is float32 ``[channels, channels]``.
        hessian_bytes: what the Hessians of a run may take.
    """
    size = max(1, hessian_bytes // sum(4 * number**2 for number in channels))
    return [range(first, min(first + size, num_experts)) for first in range(0, num_experts, size)]


def quantize_experts(
    layer: nn.Module,
    treatments: dict[LinearInput, Treatment],
    rotations: Rotations,
    routed: RoutedTokens | None,
    device: torch.device,
    hessian_bytes: int = HESSIAN_BYTES,
    workers: Workers = ALONE,
) -> ExpertsReport:
    """Quantize the experts of a decoder layer in place.

    Each has Hessians of its own, of the tokens that the router sent to it in calibration. An expert that saw
    fewer than a quarter of an input's channels is shown others' tokens as well, until it has as many
    (:meth:`RoutedTokens.shown_to`): a Hessian of very few tokens knows nothing of most directions.

    Several processes add up the Hessians of their tokens, each expert's where it is rounded, and give each
    other the codes.

    Args:
        layer: on the device, its experts opened and rotated.
        treatments: of the inputs ``gate_up`` and ``down`` of its experts.
        rotations: of the model.
        routed: what the experts saw; None without calibration.
        device: where it is computed.
        hessian_bytes: what the Hessians that exist at once may take, where one expert's take no more.
        workers: processes that share the text and the experts; each has this layer.
    """
    path = next(iter(treatments)).parent
    experts: Any = layer.get_submodule(path)
    originals = Experts(experts.gate_up_proj, experts.down_proj, experts.act_fn, experts.num_experts)
    replaced: dict[LinearInput, PackedWeight] = {}
    for entry, how in treatments.items():
        for module in quantize_input_modules(layer, entry, how, rotations).values():
            replaced[entry] = module.to(device)
            module.input_quantizer.to(device)
    if not replaced:
        return ExpertsReport()
    _set_channel_orders(replaced, originals, routed, device, workers)
    channels = [linear.weight.shape[-1] for linear in (originals.gate_up_proj, originals.down_proj)]
    with_hessian = routed is not None and any(treatments[e].weights.method == "gptq" for e in replaced)
    report = ExpertsReport()
    if routed is not None and with_hessian:
        counts, fewest = routed.counts.sum(0).tolist(), fewest_tokens(max(channels))
        report.undersampled = [expert for expert, count in enumerate(counts) if count < fewest]
    fell_back = torch.zeros(experts.num_experts, len(replaced), dtype=torch.int32, device=device)
    for batch in batches_of_experts(experts.num_experts, channels, hessian_bytes):
        own = [expert for expert in batch if workers.owner(expert) == workers.rank]
        statistics: dict[int, dict[str, InputStatistics]] = {}
        if routed is not None and with_hessian:
            found = expert_statistics(originals, routed, batch, device, with_hessian=True)
            for expert in batch:
                workers.merge(found[expert].values(), workers.owner(expert))
            statistics = {expert: found[expert] for expert in own}
            del found
        for expert in own:
            known = statistics.pop(expert, {})
            for column, (entry, module) in enumerate(replaced.items()):
                weight = getattr(originals, entry.linears[0]).weight[expert]
                fell_back[expert, column] = _quantize_expert(
                    module, expert, weight, treatments[entry].weights, known.pop(entry.name, None)
                )
    for expert in range(experts.num_experts):
        for module in replaced.values():
            matrices = [tensor[expert] for tensor in module.state_dict().values()]
            workers.give(matrices, workers.owner(expert))
    workers.add_up(fell_back)
    entries = list(replaced)
    report.fallbacks = [f"{path}.{expert}.{entries[i].name}" for expert, i in fell_back.nonzero().tolist()]
    return report


def _quantize_expert(
    module: PackedWeight, expert: int, weight: Tensor, recipe: Weights, statistics: InputStatistics | None
) -> bool:
    """Quantize one matrix; True if it was rounded to nearest although the recipe asks for GPTQ."""
    sums = None if statistics is None else statistics.hessian
    hessian = None if sums is None else sums.matrix()
    weight, hessian = in_order(weight.detach(), hessian, module.input_quantizer.channel_order)
    quantized = quantize_weight(weight, recipe, hessian)
    module.set_weight(quantized.codes, quantized.scale, quantized.multiplier, (expert,))
    return quantized.fell_back


def _set_channel_orders(
    replaced: dict[LinearInput, PackedWeight],
    originals: Experts,
    routed: RoutedTokens | None,
    device: torch.device,
    workers: Workers,
) -> None:
    """Orders by the largest magnitude that any expert saw: tokens are quantized before they are sent out."""
    ordered = {e: m.input_quantizer for e, m in replaced.items() if m.input_quantizer.scheme.stores_order}
    if routed is None or not ordered:
        return
    everyone = range(originals.num_experts)
    statistics = expert_statistics(originals, routed, everyone, device, with_hessian=False)
    for entry, quantizer in ordered.items():
        absmax = torch.stack([found[entry.name].absmax for found in statistics.values()]).amax(0)
        workers.largest(absmax)
        assert quantizer.channel_order is not None
        quantizer.channel_order.copy_(absmax.argsort(stable=True))
