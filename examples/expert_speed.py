"""Time the routed experts of one layer against bfloat16, from hidden states to their weighted sum.

    python examples/expert_speed.py --mixture Mixtral-8x7B --mixture Qwen3-30B-A3B

Random weights. Each result is compared with the reference kernels' before it is timed (on a CPU they are what
runs, so that nothing is compared). On a GPU: medians in a CUDA graph, with a cold L2; bfloat16 is the fastest
of torch's grouped product, a batched product (few tokens only) and a loop over experts.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rrsq import kernels
from rrsq.runtime.modules.experts import Experts, QuantizedExpertLinear
from rrsq.runtime.modules.input import InputQuantizer, InputScheme
from rrsq.runtime.modules.rotation import OnlineHadamard
from rrsq.runtime.rotation.hadamard import HadamardPlan, plan_hadamard

# Experts, hidden size, intermediate size, experts of a token.
MIXTURES = {
    "Mixtral-8x7B": (8, 4096, 14336, 2),
    "Qwen3-30B-A3B": (128, 2048, 768, 8),
    "tiny": (4, 128, 256, 2),
}
# What the inputs become, the channels of a weight's multiplier, and what is rotated online: blocks of so many
# channels, all of the second input, or nothing.
RECIPES: dict[str, tuple[dict[str, Any], int | None, int | str | None]] = {
    "rrs-w4a4kv4": ({"bits": 4, "group_size": 16, "scales": "integer", "signed": True}, 32, 16),
    "rrs1-w4a4kv4": ({"bits": 4, "clip": 0.9333, "group_size": 16, "scales": "integer"}, 32, "second"),
    "rrs-paper-w4a4kv4": ({"bits": 4, "group_size": 128, "scope": "sequence"}, None, "second"),
    "gptq-w4a16": ({}, 128, None),
}
BATCHED_TOKENS = 16
COLD_BYTES = 256 * 2**20
REPEATS = 20
MOST_DIFFERENCE = 0.02


def quantized(mixture: str, recipe: str, device: str) -> Experts:
    """Experts of random codes."""
    num_experts, hidden, inner, _ = MIXTURES[mixture]
    options, group_size, rotated = RECIPES[recipe]
    linears = []
    for channels, out, second in ((hidden, 2 * inner, False), (inner, hidden, True)):
        rotation = None
        if isinstance(rotated, int):
            rotation = OnlineHadamard(HadamardPlan(channels, rotated, 1))
        elif rotated is not None and second:
            rotation = OnlineHadamard(plan_hadamard(channels))
        quantizer = InputQuantizer(InputScheme(channels, **options), rotation)
        linear = QuantizedExpertLinear(
            num_experts, channels, out, group_size=group_size, input_quantizer=quantizer
        ).to(device)
        linear.weight_packed.copy_(torch.randint_like(linear.weight_packed, 256))
        linear.weight_scale.copy_(torch.rand_like(linear.weight_scale) * 1e-3)
        if linear.weight_multiplier is not None:
            linear.weight_multiplier.copy_(torch.randint_like(linear.weight_multiplier, 1, 16))
        linears.append(linear)
    return Experts(linears[0], linears[1], nn.SiLU(), num_experts)


def by_groups(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Rows sorted by expert, two grouped products."""
    experts, order = torch.sort(index.flatten())
    counts = torch.histc(experts.int(), bins=len(gate_up), min=0, max=len(gate_up) - 1)
    ends = counts.cumsum(0).to(torch.int32)
    multiply = getattr(F, "grouped_mm", None) or torch._grouped_mm
    gate, up = multiply(x[order // index.shape[1]], gate_up.transpose(-2, -1), offs=ends).chunk(2, -1)
    y = multiply(F.silu(gate) * up, down.transpose(-2, -1), offs=ends) * weights.flatten()[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=x.device)
    return y[back].view(*index.shape, -1).sum(1).to(x.dtype)


def by_rows(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Every row with its expert's weights, two batched products."""
    experts = index.flatten()
    rows = x.repeat_interleave(index.shape[1], 0)
    gate, up = torch.bmm(gate_up[experts], rows.unsqueeze(-1)).squeeze(-1).chunk(2, -1)
    y = torch.bmm(down[experts], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
    return (y * weights.flatten()[:, None]).view(*index.shape, -1).sum(1).to(x.dtype)


def by_loop(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One expert after the other; the host waits to know which."""
    y = torch.zeros_like(x)
    for expert in index.unique().tolist():
        token, slot = (index == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x[token], gate_up[expert]).chunk(2, -1)
        part = F.linear(F.silu(gate) * up, down[expert]) * weights[token, slot, None]
        y.index_add_(0, token, part.to(y.dtype))
    return y


def microseconds(run: Callable[[], object], device: str, *, graph: bool = True) -> float:
    """Median time of ``run`` after a warm-up."""
    run()
    if device == "cpu":
        times = []
        for _ in range(3):
            started = time.perf_counter()
            run()
            times.append(1e6 * (time.perf_counter() - started))
        return statistics.median(times)
    captured = torch.cuda.CUDAGraph()
    if graph:
        torch.cuda.synchronize()
        with torch.cuda.graph(captured):
            run()
    cold = torch.empty(COLD_BYTES, dtype=torch.int8, device=device)
    times = []
    for _ in range(REPEATS + 3):
        cold.zero_()
        torch.cuda.synchronize()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        captured.replay() if graph else run()
        stop.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(stop))
    return statistics.median(times[3:])


def bfloat16_time(mixture: str, inputs: tuple[Tensor, Tensor, Tensor], device: str) -> float:
    """Microseconds of the fastest way."""
    num_experts, hidden, inner, _ = MIXTURES[mixture]
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    weights = (
        torch.empty(num_experts, 2 * inner, hidden, **options).normal_(std=0.02),
        torch.empty(num_experts, hidden, inner, **options).normal_(std=0.02),
    )
    times = [microseconds(functools.partial(by_loop, *inputs, *weights), device, graph=False)]
    if device == "cuda":
        times.append(microseconds(functools.partial(by_groups, *inputs, *weights), device))
    if len(inputs[0]) <= BATCHED_TOKENS:
        times.append(microseconds(functools.partial(by_rows, *inputs, *weights), device))
    return min(times)


def check(experts: Experts, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """Compare with the reference kernels, which round some inputs of the second product to other codes."""
    actual = experts(*inputs)
    with kernels.use_kernels("eager"):
        expected = experts(*inputs)
    difference = float((actual - expected).norm() / expected.norm())
    if not difference < MOST_DIFFERENCE:
        raise SystemExit(f"the kernels' result differs from the reference by {difference:.2%}")


def token_counts(text: str) -> list[int]:
    """Positive numbers, separated by commas."""
    counts = [int(part) for part in text.split(",")]
    if min(counts) < 1:
        raise ValueError(text)
    return counts


def main() -> None:
    """Print a line a number of tokens: bfloat16's time, and each recipe's with the times faster."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mixture", action="append", choices=MIXTURES, help="default: all but tiny")
    parser.add_argument("--tokens", type=token_counts, default="1,4,16,64,256,1024,4096")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(torch.cuda.get_device_name() if device == "cuda" else "CPU", "- microseconds")
    for mixture in arguments.mixture or [name for name in MIXTURES if name != "tiny"]:
        num_experts, hidden, _, chosen = MIXTURES[mixture]
        models = {name: quantized(mixture, name, device) for name in RECIPES}
        print(f"{mixture}: tokens, bfloat16, {', '.join(RECIPES)}")
        for tokens in arguments.tokens:
            x = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16)
            index = torch.rand(tokens, num_experts, device=device).topk(chosen).indices
            inputs = x, index, torch.rand(tokens, chosen, device=device)
            base = bfloat16_time(mixture, inputs, device)
            line = f"{tokens:6} {base:9.0f}"
            for experts in models.values():
                check(experts, inputs)
                taken = microseconds(functools.partial(experts, *inputs), device)
                line += f" {taken:9.0f} ({base / taken:.2f})"
            print(line, flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
