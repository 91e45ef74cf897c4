"""Attention from the 4-bit KV cache, and storing a token, against torch's on bfloat16, on a GPU.

    python examples/attention_speed.py [--seconds 0.1] [--loads 1x128,16x1024] [--width 33024]

One layer of Llama-3-8B's shape with the default recipe's cache, in pages of 16 tokens as in vLLM, whose block
table is as wide as the longest text that is served (``--width``). Prints µs a call, CUDA graphs on all sides,
and what was checked first: the result's distance from the reference's, relative to its largest number.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn

from rrsq.benchmarking.timing import time_in_turn
from rrsq.benchmarking.whole.loads import Load, parse_loads
from rrsq.kernels import CachePages, use_kernels
from rrsq.runtime.kv_cache.quantizer import CacheScheme, KVQuantizer
from rrsq.runtime.kv_cache.rope import KeyRotary

HEADS, KV_HEADS, HEAD_DIM, PAGE = 32, 8, 128, 16
LOADS = "1x128,1x4096,16x1024,64x1024,1x32768,16x8192"
BUFFERS_BYTES = 200e6
FAR = 2e-2


def quantizer() -> KVQuantizer:
    """That of a layer of the default recipe, with offsets as large as its keys."""
    keys = CacheScheme(
        4, 32, zero_point=False, rotate=True, offset=True, signed=True, sink=True, balance=True
    )
    values = CacheScheme(4, 32, zero_point=False, rotate=False, offset=False, signed=True)
    frequency = 500000.0 ** (-torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM)
    made = KVQuantizer(keys, values, KV_HEADS, HEAD_DIM, KeyRotary(frequency))
    for calibrated in (made.keys.offset, made.keys.sink):
        assert calibrated is not None
        calibrated.normal_()
    assert made.keys.balance is not None
    made.keys.balance.copy_(torch.randint(-2, 3, made.keys.balance.shape).exp2())
    return made.cuda()


class Layer:
    """A batch's cache in pages that lie in no order, and one new query a text."""

    def __init__(self, load: Load, width: int, cache: KVQuantizer) -> None:
        self.load, self.cache = load, cache
        each = load.context // PAGE + 1
        empty = cache.pages(load.batch * each, PAGE, DEVICE)
        filled: list[Any] = [None if x is None else self._filled(x) for x in empty]
        self.pages = CachePages(*filled)
        self.table = torch.zeros(load.batch, max(width // PAGE, each), dtype=torch.int32, device=DEVICE)
        order = torch.randperm(load.batch * each, device=DEVICE).int()
        self.table[:, :each] = order.view(load.batch, each)
        self.lengths = torch.full((load.batch,), load.context, dtype=torch.int32, device=DEVICE)
        self.query = torch.randn(load.batch, 1, HEADS, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)
        self.new = torch.randn(1, 2 * KV_HEADS, load.batch, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)
        last = self.lengths.long() - 1
        rows = torch.arange(load.batch, device=DEVICE)
        self.slots = self.table[rows, last // PAGE].long() * PAGE + last % PAGE
        self.positions = last

    @staticmethod
    def _filled(stored: Tensor) -> Tensor:
        if stored.dtype == torch.uint8:
            return torch.randint_like(stored, 256)
        return torch.rand(stored.shape, device=DEVICE).mul_(0.2).half()

    def append(self) -> None:
        keys, values = self.new.chunk(2, 1)
        self.cache.append(self.pages, keys, values, self.slots, self.positions)

    def attend(self) -> Tensor:
        scale = HEAD_DIM**-0.5
        return self.cache.attend(
            self.pages, self.query, self.lengths, 0, None, None, scale, 0.0, 0, self.table
        )


class Plain:
    """The same of keys and values in bfloat16, one behind the other."""

    def __init__(self, load: Load) -> None:
        shape = (load.batch, KV_HEADS, load.context, HEAD_DIM)
        self.keys, self.values = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        self.query = torch.randn(load.batch, HEADS, 1, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)

    def attend(self) -> Tensor:
        attention: Any = nn.functional.scaled_dot_product_attention
        result: Tensor = attention(self.query, self.keys, self.values, enable_gqa=True)
        return result


DEVICE = torch.device("cuda")


def report(load: Load, width: int, cache: KVQuantizer, seconds: float) -> None:
    """Time one load."""
    nbytes = load.batch * load.context * KV_HEADS * HEAD_DIM
    count = min(max(int(BUFFERS_BYTES // nbytes), 2), 16)
    layers = [Layer(load, width, cache) for _ in range(count)]
    plains = [Plain(load) for _ in range(count)]
    layers[0].append()
    ours = layers[0].attend().float()
    with use_kernels("eager"):
        expected = layers[0].attend().float()
    distance = float((ours - expected).abs().max() / expected.abs().max())
    if not distance < FAR:
        raise SystemExit(f"{load}: the result is off by {distance:.1e}; nothing was timed")
    calls: list[list[Any]] = [
        [x.attend for x in layers],
        [x.attend for x in plains],
        [x.append for x in layers],
    ]
    attend, sdpa, append = time_in_turn(calls, DEVICE, seconds, True)
    print(
        f"{load!s:>10}: attend {attend:7.1f} µs, sdpa {sdpa:7.1f} µs ({sdpa / attend:4.2f} times),"
        f" append {append:5.1f} µs; off by {distance:.1e}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.1, help="about how long to measure each")
    parser.add_argument("--loads", type=parse_loads, default=parse_loads(LOADS), help=f"default: {LOADS}")
    parser.add_argument("--width", type=int, default=33024, help="tokens that the block table has room for")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("what is timed are kernels of an NVIDIA GPU, and torch finds none")
    print(torch.cuda.get_device_name())
    cache = quantizer()
    with torch.inference_mode():
        for load in arguments.loads:
            report(load, arguments.width, cache, arguments.seconds)


if __name__ == "__main__":
    main()
