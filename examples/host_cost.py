"""What a quantized linear costs the host: everything between forward() and the launches of its kernels.

    python examples/host_cost.py [CASE ...]

Needs no GPU: Triton's kernels and torch's product of floats are replaced by ones that do nothing, and the
linear runs on the CPU as it would on a GPU. Prints, of each case, launches a call, frames of rrsq from
``forward`` to a launch at most, and microseconds of the thread a call, the best of several rounds.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor, nn
from triton.runtime.interpreter import InterpretedFunction

import rrsq
from rrsq import kernels
from rrsq.kernels import use_kernels
from rrsq.runtime.modules.experts import QuantizedExpertLinear
from rrsq.runtime.modules.input import InputQuantizer, InputScheme
from rrsq.runtime.modules.linear import QuantizedLinear
from rrsq.runtime.modules.rotation import OnlineHadamard
from rrsq.runtime.rotation.hadamard import HadamardPlan, plan_hadamard

CHANNELS = 4096
EXPERTS, TOP_K = 8, 2
FIRST = InputScheme(CHANNELS, bits=4, clip=0.9333, group_size=16, scales="integer")
SIGNED = InputScheme(CHANNELS, bits=4, group_size=16, scales="integer", signed=True)
PAPER = InputScheme(CHANNELS, bits=4, group_size=128, scope="sequence")
W4A16 = InputScheme(CHANNELS)
_SOURCES = str(Path(rrsq.__file__).parent)


@dataclass(frozen=True)
class Case:
    """A linear and how many tokens it is given."""

    tokens: int
    scheme: InputScheme = FIRST
    rotation: HadamardPlan | None = None
    experts: bool = False

    def linear(self) -> QuantizedExpertLinear | QuantizedLinear:
        """The linear, without a weight that was unpacked, which a CPU keeps and a GPU does not."""
        quantizer = InputQuantizer(self.scheme, self.rotation and OnlineHadamard(self.rotation))
        linear: QuantizedExpertLinear | QuantizedLinear
        if self.experts:
            linear = QuantizedExpertLinear(
                EXPERTS, CHANNELS, CHANNELS, group_size=32, input_quantizer=quantizer
            )
        else:
            linear = QuantizedLinear(
                CHANNELS,
                CHANNELS,
                group_size=32,
                bias=False,
                input_quantizer=quantizer,
                dtype=torch.bfloat16,
            )
        linear._cpu_operand = lambda: None  # type: ignore[method-assign]
        return linear

    def call(self) -> Callable[[], Tensor]:
        """A call of the linear."""
        linear, x = self.linear(), torch.randn(self.tokens, CHANNELS, dtype=torch.bfloat16)
        if not self.experts:
            return lambda: linear(x)
        routing = kernels.route_rows(torch.arange(self.tokens * TOP_K) % EXPERTS, EXPERTS)
        return lambda: linear(x, routing, TOP_K)


BLOCKS = HadamardPlan(CHANNELS, 16, 1)
CASES = {
    "1 token": Case(1),
    "16 tokens": Case(16),
    "512 tokens": Case(512),
    "1 token, rotated": Case(1, rotation=plan_hadamard(CHANNELS)),
    "512 tokens, rotated": Case(512, rotation=plan_hadamard(CHANNELS)),
    "1 token, signed": Case(1, SIGNED, BLOCKS),
    "16 tokens, signed": Case(16, SIGNED, BLOCKS),
    "1 token, W4A16": Case(1, W4A16),
    "512 tokens, W4A16, rotated": Case(512, W4A16, plan_hadamard(CHANNELS)),
    "16 tokens, real scales": Case(16, PAPER),
    "512 tokens, real scales, rotated": Case(512, PAPER, plan_hadamard(CHANNELS)),
    "1 token, experts": Case(1, experts=True),
    "512 tokens, experts": Case(512, experts=True),
    "512 tokens, experts, real scales, rotated": Case(512, PAPER, plan_hadamard(CHANNELS), experts=True),
}


class Launches:
    """In place of launches: counts them, and the frames of rrsq that lead from ``forward`` to one."""

    def __init__(self) -> None:
        self.count = 0
        self.frames = 0
        self.counting = False

    def __enter__(self) -> Launches:
        self._launch, self._linear = InterpretedFunction.__getitem__, nn.functional.linear
        InterpretedFunction.__getitem__ = lambda kernel, grid: self._do_nothing
        nn.functional.linear = self._no_product
        return self

    def __exit__(self, *_: object) -> None:
        InterpretedFunction.__getitem__, nn.functional.linear = self._launch, self._linear

    def _no_product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        self._do_nothing()
        return x.new_empty(x.shape[0], weight.shape[0])

    def _do_nothing(self, *args: object, **kwargs: object) -> None:
        if not self.counting:
            return
        self.count += 1
        frame, frames = sys._getframe(1), 0
        while frame is not None:
            ours = frame.f_code.co_filename.startswith(_SOURCES)
            frames += ours
            if ours and frame.f_code.co_name == "forward":
                break
            frame = frame.f_back
        self.frames = max(self.frames, frames)

    def of(self, call: Callable[[], object]) -> tuple[int, int]:
        """Launches of one call, and frames to one at most."""
        self.count = self.frames = 0
        self.counting = True
        try:
            call()
        finally:
            self.counting = False
        return self.count, self.frames


def microseconds(call: Callable[[], object], repeats: int = 200, rounds: int = 10) -> float:
    """Of one call, in the fastest round."""
    best = float("inf")
    for _ in range(rounds):
        start = time.thread_time()
        for _ in range(repeats):
            call()
        best = min(best, (time.thread_time() - start) / repeats)
    return best * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"all by default: {'; '.join(CASES)}")
    names = parser.parse_args().cases or list(CASES)
    if unknown := set(names) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are: {'; '.join(CASES)}")
    print(f"{'case':42} launches  frames  µs a call")
    with torch.inference_mode(), use_kernels("triton"), Launches() as launches:
        for name in names:
            call = CASES[name].call()
            for _ in range(3):  # It prepares when it sees its weight again.
                call()
            count, frames = launches.of(call)
            print(f"{name:42} {count:8} {frames:7} {microseconds(call):10.1f}")
        plain, x = nn.Identity(), torch.empty(0)
        print(f"{'a module that does nothing':42} {0:8} {0:7} {microseconds(lambda: plain(x)):10.1f}")


if __name__ == "__main__":
    main()
