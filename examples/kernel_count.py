"""Kernels that a GPU runs for one new token, with and without those that do the work of several.

    python examples/kernel_count.py [--shape Llama-3-8B] [--layers 8]

Of models with random weights, so many layers and half as many: a layer's is what their decode steps
differ by.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from rrsq.benchmarking.whole.descriptions import describe, public_config
from rrsq.benchmarking.whole.models import _make_up
from rrsq.recipe import load_recipe
from rrsq.runtime import fusion, norms
from rrsq.runtime.modules.deferred import fuses

STEPS = 4


def decode(model: Any) -> Counter[str]:
    """Kernels of a decode step, by name: those that the profiler sees, of graphs too."""
    tokens = torch.arange(100, 140, device="cuda").unsqueeze(0)
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
        token = tokens[:, :1]
        for _ in range(6):
            model(token, past_key_values=cache)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
            for _ in range(STEPS):
                model(token, past_key_values=cache)
            torch.cuda.synchronize()
    names = [event.name for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return Counter(names)


def count(shape: str, layers: int, fused: bool) -> Counter[str]:
    # Captured graphs keep what they were captured with: each model is a new one.
    for module in (fusion, norms):
        module.fuses = fuses  # type: ignore[attr-defined]
    if not fused:
        fusion.fuses = lambda x: False  # type: ignore[assignment]
        fusion._is_rotary = lambda function: False  # type: ignore[assignment]
        norms.NormForward.defers = lambda self, x: False  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        described = describe(public_config(shape, layers), load_recipe("rrs-w4a4kv4", []))
        Path(folder, "config.json").write_text(json.dumps(described))
        model = _make_up(Path(folder), torch.device("cuda"))
        return decode(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="Llama-3-8B")
    parser.add_argument("--layers", type=int, default=8)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("what is counted are kernels of an NVIDIA GPU, and torch finds none")
    for fused in (True, False):
        whole, half = (count(options.shape, n, fused) for n in (options.layers, options.layers // 2))
        added = options.layers - options.layers // 2
        total = (sum(whole.values()) - sum(half.values())) / STEPS / added
        print(f"{'fused' if fused else 'as it was'}: {total:.2f} kernels a layer")
        for name in sorted(whole, key=lambda name: half[name] - whole[name]):
            each = (whole[name] - half[name]) / STEPS / added
            if each > 0:
                print(f"  {each:6.2f}  {name[:90]}")


if __name__ == "__main__":
    main()
