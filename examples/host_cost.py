"""What modules cost the host: everything between forward() and the launches of their kernels.

    python examples/host_cost.py [CASE ...]

Needs no GPU: Triton's kernels and torch's product of floats are replaced by ones that do nothing, and what is
measured runs on the CPU as it would on a GPU. Prints, of each case, launches a call, frames of rrsq from its
first to a launch at most, and microseconds of the thread a call, the best of many rounds. The last two lines
say how fast the machine is: allocations are most of what is left, two or three of them a linear.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations import sdpa_attention
from triton.runtime.interpreter import InterpretedFunction

import rrsq
from rrsq import kernels
from rrsq.kernels import use_kernels
from rrsq.models.llama import LLAMA
from rrsq.recipe import load_recipe
from rrsq.runtime.assemble import attach_kv_quantizer
from rrsq.runtime.kv_cache.attention import ATTENTION, use_attention
from rrsq.runtime.kv_cache.quantizer import KVQuantizer
from rrsq.runtime.kv_cache.rope import KeyRotary
from rrsq.runtime.kv_cache.static import CachedTokens, CodesLayer, Storage
from rrsq.runtime.modules.experts import QuantizedExpertLinear
from rrsq.runtime.modules.input import InputQuantizer, InputScheme
from rrsq.runtime.modules.int8_linear import Int8Linear
from rrsq.runtime.modules.linear import QuantizedLinear
from rrsq.runtime.modules.rotation import OnlineHadamard, online_rotation
from rrsq.runtime.norms import NormForward
from rrsq.runtime.rotation.hadamard import plan_hadamard
from rrsq.runtime.rotation.rotations import make_rotations
from rrsq.runtime.scheme import group_size_for, input_scheme, treatment

SIZES = LLAMA.public["Llama-3-8B"]
CHANNELS = SIZES.hidden
EXPERTS, TOP_K = 8, 2
ROWS = 16384
"""Of a head: a real one has more, in blocks of so many where tokens are many."""
TOKENS = (1, 16, 64, 2048)
_TRIM_THRESHOLD, _MAPPINGS = -1, -4
"""Of ``mallopt``."""
_SOURCES = str(Path(rrsq.__file__).parent)

Call = Callable[[], object]


@dataclass(frozen=True)
class LinearCase:
    """A linear of a recipe and how many tokens it is given."""

    tokens: int
    recipe: str
    input: str = "qkv"
    experts: bool = False

    def linear(self) -> QuantizedExpertLinear | QuantizedLinear:
        """The linear, without a weight that was unpacked, which a CPU keeps and a GPU does not."""
        recipe = load_recipe(self.recipe)
        entry = next(entry for entry in LLAMA.inputs if entry.name == self.input)
        channels = SIZES.intermediate if self.input == "down" else CHANNELS
        how = treatment(recipe, "model.layers.0", entry)
        rotation = online_rotation(entry, make_rotations(recipe.rotation, SIZES, 0), channels)
        quantizer = InputQuantizer(input_scheme(how.activations, entry, channels), rotation)
        group_size = group_size_for(how.weights.group_size, channels)
        if self.experts:
            linear: QuantizedExpertLinear | QuantizedLinear = QuantizedExpertLinear(
                EXPERTS, channels, CHANNELS, group_size=group_size, input_quantizer=quantizer
            )
        else:
            linear = QuantizedLinear(
                channels,
                CHANNELS,
                group_size=group_size,
                bias=False,
                input_quantizer=quantizer,
                dtype=torch.bfloat16,
            )
        linear._cpu_operand = lambda: None  # type: ignore[method-assign]
        return linear

    def call(self) -> Call:
        """A call of the linear."""
        linear = self.linear()
        x = torch.randn(self.tokens, linear.input_quantizer.scheme.channels, dtype=torch.bfloat16)
        if not self.experts:
            return lambda: linear(x)
        routing = kernels.route_rows(torch.arange(self.tokens * TOP_K) % EXPERTS, EXPERTS)
        return lambda: linear(x, routing, TOP_K)


@dataclass(frozen=True)
class ModuleCase:
    """An output head, a norm or an online rotation of its own."""

    tokens: int
    module: Callable[[], Callable[[Tensor], Tensor]]

    def call(self) -> Call:
        """A call of the module."""
        module, x = self.module(), torch.randn(1, self.tokens, CHANNELS, dtype=torch.bfloat16)
        return lambda: module(x)


def head_of_8_bits() -> nn.Module:
    """As ``head.bits: 8`` makes it."""
    return Int8Linear(CHANNELS, ROWS, bias=False, dtype=torch.bfloat16)


def head_of_4_bits() -> nn.Module:
    """As ``head.bits: 4`` makes it."""
    quantizer = InputQuantizer(InputScheme(CHANNELS))
    head = QuantizedLinear(
        CHANNELS, ROWS, group_size=32, bias=False, input_quantizer=quantizer, dtype=torch.bfloat16
    )
    head._cpu_operand = lambda: None  # type: ignore[method-assign]
    return head


def norm() -> NormForward:
    """The forward pass of Llama's norm."""
    return NormForward(nn.RMSNorm(CHANNELS, dtype=torch.bfloat16), 1e-5, 0.0, False)


def rotation() -> OnlineHadamard:
    """In front of a linear that stays in full precision."""
    return OnlineHadamard(plan_hadamard(CHANNELS))


@dataclass(frozen=True)
class CacheCase:
    """New tokens behind a cache of 1024: what stores them, or what attends to all."""

    tokens: int
    stores: bool
    cached: int = 1024

    def call(self) -> Call:
        """A call of the cache layer, or of the attention function."""
        recipe, parent = load_recipe("rrs-w4a4kv4"), nn.Module()
        assert recipe.kv_cache is not None
        parent.self_attn = nn.Module()
        rope = KeyRotary(torch.ones(SIZES.head_dim // 2))
        quantizer = attach_kv_quantizer(parent, LLAMA, recipe.kv_cache, SIZES, rope, 4)
        assert isinstance(quantizer, KVQuantizer)
        storage = Storage((quantizer,), (None,), 1, self.cached + self.tokens, torch.device("cpu"))
        layer = CodesLayer(quantizer, None, storage)
        keys = torch.randn(1, SIZES.kv_heads, self.tokens, SIZES.head_dim, dtype=torch.bfloat16)
        query = torch.randn(1, SIZES.heads, self.tokens, SIZES.head_dim, dtype=torch.bfloat16)

        def store() -> None:
            layer.tokens = self.cached
            layer.update(keys, keys)

        store()
        tokens = CachedTokens(layer, self.tokens)
        use_attention(SimpleNamespace(_attn_implementation="sdpa", output_attentions=False))
        attention = AttentionInterface()[ATTENTION]
        return store if self.stores else lambda: attention(parent, query, tokens, tokens, None, 0.125)


Case = LinearCase | ModuleCase | CacheCase
RECIPES = {
    "rrs-w4a4kv4": LinearCase(1, "rrs-w4a4kv4"),
    "gptq-w4a16": LinearCase(1, "gptq-w4a16"),
    "rrs-paper-w4a4kv4, qkv": LinearCase(1, "rrs-paper-w4a4kv4"),
    "rrs-paper-w4a4kv4, down": LinearCase(1, "rrs-paper-w4a4kv4", "down"),
    "rrs1-w4a4kv4, qkv": LinearCase(1, "rrs1-w4a4kv4"),
    "rrs1-w4a4kv4, down": LinearCase(1, "rrs1-w4a4kv4", "down"),
    "rrs-w4a4kv4, experts": LinearCase(1, "rrs-w4a4kv4", experts=True),
    "rrs-paper-w4a4kv4, experts, down": LinearCase(1, "rrs-paper-w4a4kv4", "down", experts=True),
    "head, 8 bits": ModuleCase(1, head_of_8_bits),
    "head, 4 bits": ModuleCase(1, head_of_4_bits),
    "norm": ModuleCase(1, norm),
    "rotation": ModuleCase(1, rotation),
    "cache, new tokens": CacheCase(1, stores=True),
    "cache, attention": CacheCase(1, stores=False),
}
CASES: dict[str, Case] = {
    f"{name}, {tokens}": replace(case, tokens=tokens) for name, case in RECIPES.items() for tokens in TOKENS
}


class Launches:
    """In place of launches: counts them, and the frames of rrsq that lead to one."""

    def __init__(self) -> None:
        self.count = 0
        self.frames = 0
        self.counting = False

    def __enter__(self) -> Launches:
        self._launch, self._linear = InterpretedFunction.__getitem__, nn.functional.linear
        self._attention = sdpa_attention.sdpa_attention_forward
        InterpretedFunction.__getitem__ = lambda kernel, grid: self._do_nothing
        nn.functional.linear = self._no_product
        sdpa_attention.sdpa_attention_forward = lambda module, query, *_, **__: (query, None)
        return self

    def __exit__(self, *_: object) -> None:
        InterpretedFunction.__getitem__, nn.functional.linear = self._launch, self._linear
        sdpa_attention.sdpa_attention_forward = self._attention

    def _no_product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        self._do_nothing()
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    def _do_nothing(self, *args: object, **kwargs: object) -> None:
        if not self.counting:
            return
        self.count += 1
        frame, frames = sys._getframe(1), 0
        while frame is not None:
            frames += frame.f_code.co_filename.startswith(_SOURCES)
            frame = frame.f_back
        self.frames = max(self.frames, frames)

    def of(self, call: Call) -> tuple[int, int]:
        """Launches of one call, and frames to one at most."""
        self.count = self.frames = 0
        self.counting = True
        try:
            call()
        finally:
            self.counting = False
        return self.count, self.frames


def microseconds(call: Call, repeats: int = 20, rounds: int = 10) -> float:
    """Of one call, in the fastest round."""
    best = float("inf")
    for _ in range(rounds):
        start = time.thread_time()
        for _ in range(repeats):
            call()
        best = min(best, (time.thread_time() - start) / repeats)
    return best * 1e6


def keep_memory() -> None:
    """Have the C library keep what is freed, as a GPU's allocator does: the system's pages cost more."""
    with contextlib.suppress(AttributeError, OSError):  # Not glibc.
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_MAPPINGS, 0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"all by default: {'; '.join(CASES)}")
    parser.add_argument("--passes", type=int, default=10, help="over all cases")
    options = parser.parse_args()
    names, passes = options.cases or list(CASES), options.passes
    if unknown := set(names) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are: {'; '.join(CASES)}")
    keep_memory()
    calls: dict[str, Call] = {}
    reached: dict[str, tuple[int, int]] = {}
    best: dict[str, float] = {}
    with torch.inference_mode(), use_kernels("triton"), Launches() as launches:
        for name in names:
            calls[name] = CASES[name].call()
            for _ in range(3):  # It prepares when it sees its weight again.
                calls[name]()
            reached[name] = launches.of(calls[name])
        plain, x = nn.Identity(), torch.empty(0)
        calls["a module that does nothing"] = lambda: plain(x)
        calls["an allocation"] = lambda: torch.empty((1, CHANNELS), dtype=torch.int8, device=x.device)
        for _ in range(passes):  # What else the machine does is not the same in all of them.
            for name, call in calls.items():
                best[name] = min(best.get(name, float("inf")), microseconds(call))
    print(f"{'case':42} launches  frames  µs a call")
    for name, time_taken in best.items():
        count, frames = reached.get(name, (0, 0))
        print(f"{name:42} {count:8} {frames:7} {time_taken:10.1f}")


if __name__ == "__main__":
    main()
