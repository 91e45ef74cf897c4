"""What a quantized linear costs the host: everything between forward() and the launches of its kernels.

    python examples/host_cost.py [--tokens 1]

Needs no GPU: Triton's kernels are replaced by ones that do nothing, and the linear runs on the CPU as it
would on a GPU. Prints microseconds a call, the best of several runs of a thousand.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

os.environ["TRITON_INTERPRET"] = "1"

import torch
from triton.runtime.interpreter import InterpretedFunction

from rrsq.kernels import use_kernels
from rrsq.runtime.modules.input import InputQuantizer, InputScheme
from rrsq.runtime.modules.linear import QuantizedLinear
from rrsq.runtime.modules.rotation import OnlineHadamard
from rrsq.runtime.rotation.hadamard import HadamardPlan

CHANNELS = 4096
launches = 0


def _do_not_launch(self: InterpretedFunction, grid: object) -> Callable[..., None]:
    def launch(*args: object, **kwargs: object) -> None:
        global launches
        launches += 1

    return launch


def quantized_linear() -> QuantizedLinear:
    """One of the default recipe, with random codes."""
    scheme = InputScheme(CHANNELS, bits=4, group_size=16, scales="integer", signed=True)
    rotation = OnlineHadamard(HadamardPlan(CHANNELS, 16, 1))
    linear = QuantizedLinear(
        CHANNELS,
        CHANNELS,
        group_size=32,
        bias=False,
        input_quantizer=InputQuantizer(scheme, rotation),
        dtype=torch.bfloat16,
    )
    linear._operand = torch.empty(0, dtype=torch.int8)  # What a CPU would unpack; unused by the kernels.
    return linear.requires_grad_(False)


def microseconds(call: Callable[[], object], repeats: int = 1000, rounds: int = 7) -> float:
    """Of one call, in the fastest round."""
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        best = min(best, (time.perf_counter() - start) / repeats)
    return best * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1)
    tokens = parser.parse_args().tokens
    InterpretedFunction.__getitem__ = _do_not_launch
    linear = quantized_linear()
    x = torch.randn(1, tokens, CHANNELS, dtype=torch.bfloat16)
    plain = torch.nn.Identity()
    with torch.inference_mode(), use_kernels("triton"):
        for _ in range(3):  # It prepares when it sees its weight again.
            linear(x)
        before = launches
        linear(x)
        print(f"{launches - before} launches a call")
        print(f"{microseconds(lambda: linear(x)):.1f} µs a call of a quantized linear")
        print(f"{microseconds(lambda: plain(x)):.1f} µs a call of a module that does nothing")


if __name__ == "__main__":
    main()
