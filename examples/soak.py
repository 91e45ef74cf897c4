"""Run a model for long: many generate() calls of all kinds in one process, then several threads at once.

    python examples/soak.py CHECKPOINT [--calls 2000] [--minutes 60] [--threads 8] [--device auto]
        [--longest-prompt 200] [--longest-text 48] [--sample 25] [--growth 64]

Calls have random batches, lengths and paddings; some are cancelled half way, as a server does when a client
goes. Prints the memory in use and the tensors alive as it goes. At the end a sample of the calls is made
again in a fresh process, and the threads' texts are compared with those of one thread. The last line is the
verdict; exits with 1 where memory grew, a tensor was left over or a text differs. With a 4-bit cache on a
GPU, decode steps are replayed as CUDA graphs; how many graphs are kept for the next call is printed too, and
tensors are not held against a model that keeps them.

On a CPU a call of a tiny random model takes about half a second; ``--longest-text`` shortens it. A tiny model
leaks little at a time: what it leaks shows in the tensors alive, for which nothing is forgiven.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

import rrsq
from rrsq.runtime.decoding import Decoder

LINES = 40
"""Lines of progress, at most."""


class CancelledError(Exception):
    """Raised in the middle of a generation."""


class CancelAt(StoppingCriteria):
    """Raises once the text is so long."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        if input_ids.shape[1] >= self.length:
            raise CancelledError
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@dataclass(frozen=True)
class Lengths:
    """Tokens of a call, at most."""

    prompt: int
    text: int


def call(model: Any, seed: int, longest: Lengths) -> list[list[int]] | None:
    """One generate() call, all of it decided by the seed; None if it was cancelled."""
    draw = random.Random(seed)
    batch = draw.choice((1, 1, 1, 2, 4))
    length, new = draw.randint(1, longest.prompt), draw.randint(1, longest.text)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.randint(0, vocabulary, (batch, length), generator=generator).to(model.device)
    mask = torch.ones_like(tokens)
    for row in range(1, batch):
        mask[row, : draw.randint(0, length - 1)] = 0
    criteria = [CancelAt(length + max(new // 2, 1))] if draw.random() < 0.1 else []
    try:
        out = model.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            num_beams=2 if draw.random() < 0.1 else 1,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList(criteria),
        )
    except CancelledError:
        return None
    return out[:, length:].tolist()


def memory(device: torch.device) -> dict[str, int]:
    """Bytes of the process and, with a GPU, of its tensors."""
    used = {"the process": psutil.Process().memory_info().rss}
    if device.type == "cuda":
        used["the GPU's tensors"] = torch.cuda.memory_allocated(device)
    return used


def tensors() -> tuple[int, int]:
    """How many tensors are alive once garbage is collected, and their bytes."""
    gc.collect()
    alive = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
    return len(alive), sum(each.nbytes for each in alive)


def graphs(model: Any) -> int:
    """CUDA graphs of decode steps that are kept for the next caches."""
    if not isinstance(model.forward, Decoder):
        return 0
    return sum(len(storage.graphs) for storage in model.forward._pool._free)


def in_a_fresh_process(arguments: argparse.Namespace, seeds: list[int]) -> list[Any]:
    """The results of some calls in another process, each the first but for those before it in the list."""
    command = [sys.executable, __file__, arguments.checkpoint, "--device", arguments.device]
    command += ["--longest-prompt", str(arguments.longest_prompt)]
    command += ["--longest-text", str(arguments.longest_text), "--seeds", *map(str, seeds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def soak(model: Any, arguments: argparse.Namespace) -> list[str]:
    """What is wrong after many calls."""
    wrong, used, results, alive = [], [], {}, []
    began = time.monotonic()
    for seed in range(arguments.calls):
        results[seed] = call(model, seed, lengths(arguments))
        used.append(memory(model.device))
        seconds = time.monotonic() - began
        over = seconds > 60 * arguments.minutes
        if over or (seed + 1) % max(arguments.calls // LINES, 1) == 0:
            sizes = ", ".join(f"{size / 2**20:.0f} MiB of {what}" for what, size in used[-1].items())
            alive.append((graphs(model), *tensors()))
            print(
                f"{seed + 1} calls in {seconds:.0f} s, {sizes}, {alive[-1][1]} tensors alive of "
                f"{alive[-1][2] / 2**20:.2f} MiB, {alive[-1][0]} graphs",
                flush=True,
            )
        if over:
            break
    cancelled = sum(result is None for result in results.values())
    print(f"{len(results)} calls, {cancelled} of them cancelled")
    texts = {str(result) for result in results.values() if result is not None}
    print(f"{len(texts)} different texts of {len(results) - cancelled}")
    quarter = max(len(used) // 4, 1)
    for what in used[0]:
        sizes = [each[what] for each in used]
        growth = (max(sizes[-quarter:]) - max(sizes[:quarter])) / 2**20
        print(f"memory of {what} grew by {growth:.1f} MiB from the first quarter of the calls to the last")
        if growth > arguments.growth:
            wrong.append(f"memory of {what} grew by {growth:.0f} MiB")
    (_, before, _), (kept, after, _) = alive[0], alive[-1]
    if not kept and after > before:
        wrong.append(f"{after - before} tensors more are alive after the last call than near the first")
    whole = [seed for seed, result in results.items() if result is not None]
    sample = random.Random(0).sample(whole, min(arguments.sample, len(whole)))
    fresh = in_a_fresh_process(arguments, sample)
    differ = [seed for seed, expected in zip(sample, fresh, strict=True) if results[seed] != expected]
    print(f"{len(sample) - len(differ)} of {len(sample)} calls gave the text of a fresh process", flush=True)
    if differ:
        wrong.append(f"calls {differ} gave other texts than a fresh process")
    return wrong


def threads(model: Any, arguments: argparse.Namespace) -> list[str]:
    """What is wrong when several threads use one model at once."""
    count, longest = arguments.threads, lengths(arguments)
    seeds = range(10 * count)
    alone = [call(model, seed, longest) for seed in seeds]
    with ThreadPoolExecutor(count) as pool:
        together = list(pool.map(lambda seed: call(model, seed, longest), seeds))
    differ = [seed for seed, a, b in zip(seeds, alone, together, strict=True) if a != b]
    right = len(seeds) - len(differ)
    print(f"{right} of {len(seeds)} calls of {count} threads gave the text of one thread", flush=True)
    return [f"calls {differ} gave other texts in {count} threads"] if differ else []


def lengths(arguments: argparse.Namespace) -> Lengths:
    return Lengths(arguments.longest_prompt, arguments.longest_text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=1e9, help="of calls in one thread, at most")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--longest-prompt", type=int, default=200, help="tokens of a prompt, at most")
    parser.add_argument("--longest-text", type=int, default=48, help="new tokens of a call, at most")
    parser.add_argument("--sample", type=int, default=25, help="calls that are made again in a fresh process")
    parser.add_argument(
        "--growth", type=float, default=64, help="MiB that the last quarter may take more than the first"
    )
    parser.add_argument("--seeds", type=int, nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not Path(arguments.checkpoint).is_dir():
        parser.error(f"there is no folder '{arguments.checkpoint}'")
    model = rrsq.load(arguments.checkpoint, device=arguments.device)
    if arguments.seeds is not None:
        print(json.dumps([call(model, seed, lengths(arguments)) for seed in arguments.seeds]))
        return
    wrong = soak(model, arguments) + threads(model, arguments)
    print(f"WRONG: {'; '.join(wrong)}" if wrong else "RIGHT: memory is flat, and every text is the same")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
