"""Norms, gates and RoPE in one kernel each, against the kernels they take the place of, on a GPU.

    python examples/fused_speed.py [--seconds 0.1]

Prints µs a call, CUDA graphs on both sides; the rate at which the bytes that have to be moved are; and what
was checked first, the share of codes that differ from those of the chain (by the last bit of an activation,
see the operations' documentation).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rrsq import kernels
from rrsq.benchmarking.timing import time_in_turn

TOKENS = (1, 16, 2048, 8192)
CHANNELS = (4096, 14336)
QUANTIZATION = (4, 16, 16)
GAIN = (1e-5, 0.0, False)
BUFFERS_BYTES = 200e6


def copies(make: Callable[[], Any], nbytes: int) -> list[Any]:
    """So many that they do not stay in the cache; at least two."""
    return [make() for _ in range(min(max(int(BUFFERS_BYTES // max(nbytes, 1)), 2), 32))]


def differing(fused: tuple[Tensor, ...], chain: tuple[Tensor, ...]) -> float:
    """The share of codes that differ; scales have to be near."""
    torch.testing.assert_close(fused[1], chain[1], rtol=2**-7, atol=0)
    return float((fused[0] != chain[0]).float().mean())


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    return kernels.quantize_signed(x, *QUANTIZATION)


def norm_chain(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, ...]:
    total = x if residual is None else residual + x
    operand, scale = quantized(kernels.rms_norm(total, weight, *GAIN))
    return (operand, scale) if residual is None else (operand, scale, total)


def gate_chain(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = gate_up.chunk(2, dim=1)
    return quantized(torch.nn.functional.silu(gate) * up)


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def rotary_chain(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return query * cos + rotate_half(query) * sin, key * cos + rotate_half(key) * sin


def report(
    name: str,
    tokens: int,
    nbytes: int,
    make: Callable[[], tuple[Any, ...]],
    fused: Callable[..., Any],
    chain: Callable[..., Any],
    check: Callable[[Any, Any], float],
    seconds: float,
) -> None:
    arguments = copies(make, nbytes)
    unequal = check(fused(*arguments[0]), chain(*arguments[0]))
    calls = [[lambda a=a, f=f: f(*a) for a in arguments] for f in (fused, chain)]
    ours, theirs = time_in_turn(calls, torch.device("cuda"), seconds, True)
    print(
        f"{name:28} {tokens:6} tokens {ours:9.2f} µs, chain {theirs:9.2f} µs, {theirs / ours:5.2f} times;"
        f" {nbytes / ours / 1e6:5.2f} TB/s; codes that differ {unequal:.1e}",
        flush=True,
    )


def rotary_difference(fused: tuple[Tensor, ...], chain: tuple[Tensor, ...]) -> float:
    for actual, expected in zip(fused, chain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2**-6, atol=2**-5)
    return float((fused[0] != chain[0]).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.1, help="about how long to measure each")
    seconds = parser.parse_args().seconds
    if not torch.cuda.is_available():
        parser.error("what is timed are kernels of an NVIDIA GPU, and torch finds none")
    print(torch.cuda.get_device_name())
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    for channels in CHANNELS:
        weight = torch.rand(channels, **options) + 0.5
        for tokens in TOKENS:
            half = tokens * channels * 2

            def rows(count: int = 1, tokens: int = tokens, channels: int = channels) -> Tensor:
                return torch.randn(tokens, count * channels, **options)

            def normed(x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, ...]:
                if residual is None:
                    return kernels.rms_norm_quantize(x, weight, *GAIN, *QUANTIZATION)
                return kernels.add_rms_norm_quantize(x, residual, weight, *GAIN, *QUANTIZATION)

            report(
                f"quantize {channels}",
                tokens,
                half * 3 // 2,
                lambda rows=rows: (rows(),),
                quantized,
                quantized,
                differing,
                seconds,
            )
            report(
                f"norm {channels}",
                tokens,
                half * 3 // 2,
                lambda rows=rows, weight=weight: (rows(), None, weight),
                normed,
                norm_chain,
                differing,
                seconds,
            )
            report(
                f"addition, norm {channels}",
                tokens,
                half * 7 // 2,
                lambda rows=rows, weight=weight: (rows(), rows(), weight),
                normed,
                norm_chain,
                differing,
                seconds,
            )
            report(
                f"gate {channels}",
                tokens,
                half * 5 // 2,
                lambda rows=rows: (rows(2),),
                lambda x: kernels.gated_quantize(x, "silu", *QUANTIZATION),
                gate_chain,
                differing,
                seconds,
            )
    for tokens in TOKENS:

        def heads(tokens: int = tokens) -> tuple[Tensor, ...]:
            row = torch.randn(1, tokens, 48 * 128, **options)
            query, key, _ = row.split([4096, 1024, 1024], dim=-1)
            angle = torch.rand(1, tokens, 64, device="cuda").repeat(1, 1, 2) * 6
            parts = [x.unflatten(-1, (-1, 128)).transpose(1, 2) for x in (query, key)]
            return *parts, angle.cos().bfloat16(), angle.sin().bfloat16()

        moved = tokens * (2 * 5120 + 2 * 128) * 2
        report(
            "rotary 32 + 8 heads of 128",
            tokens,
            moved,
            heads,
            kernels.rotary,
            rotary_chain,
            rotary_difference,
            seconds,
        )


if __name__ == "__main__":
    main()
