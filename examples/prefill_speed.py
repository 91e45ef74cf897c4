"""Time the forward pass of a 512-token prompt, quantized beside the original, and tokens one at a time.

    python examples/prefill_speed.py ORIGINAL CHECKPOINT

Medians of several runs after a warm-up, both models in bfloat16, on the CPU without ``--device cuda``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import rrsq

PROMPT_TOKENS = 512
REPEATS = 7
NEW_TOKENS = 16


def median_seconds(run: Callable[[], object], device: str) -> float:
    """Median time of ``run`` after one warm-up call."""
    durations = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        durations.append(time.perf_counter() - started)
    return statistics.median(durations[1:])


def main() -> None:
    """Print both models' times and their ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("original")
    parser.add_argument("checkpoint")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    times = {}
    for name in (arguments.original, arguments.checkpoint):
        model = rrsq.load(name, device=arguments.device, dtype="bfloat16")
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(0, model.config.vocab_size, (1, PROMPT_TOKENS), generator=generator)
        prompt = prompt.to(arguments.device)
        with torch.inference_mode():
            prefill = median_seconds(lambda m=model, p=prompt: m(p, logits_to_keep=1), arguments.device)
            generate = median_seconds(
                lambda m=model, p=prompt: m.generate(
                    p[:, :32], min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, do_sample=False
                ),
                arguments.device,
            )
        times[name] = prefill, generate / NEW_TOKENS
        per_token = 1e3 * generate / NEW_TOKENS
        print(f"{name}: {1e3 * prefill:.0f} ms for {PROMPT_TOKENS} tokens, {per_token:.1f} ms a new token")
    (before, slow), (after, slower) = times[arguments.original], times[arguments.checkpoint]
    print(f"quantized over original: {after / before:.2f} (prompt), {slower / slow:.2f} (a new token)")


if __name__ == "__main__":
    main()
