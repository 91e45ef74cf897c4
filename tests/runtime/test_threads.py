"""Several threads that use one model at once, as a server's do."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch

import rrsq
from tiny_quantized import random_tokens

THREADS = 8
PROMPTS = [random_tokens(1 + i % 2, 3 + 5 * i, seed=i) for i in range(THREADS)]


def generated(model: Any, prompt: torch.Tensor) -> torch.Tensor:
    return model.generate(prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("checkpoint", ["qwen2_checkpoint", "fully_rotated_checkpoint"])
def test_generate_in_threads_gives_what_it_gives_alone(
    checkpoint: str, request: pytest.FixtureRequest
) -> None:
    """The model that the threads share is fresh, so that they make together what it keeps between calls."""
    path: Path = request.getfixturevalue(checkpoint)
    expected = [generated(rrsq.load(str(path), device="cpu"), prompt) for prompt in PROMPTS]
    shared = rrsq.load(str(path), device="cpu")
    together = Barrier(THREADS)

    def run(prompt: torch.Tensor) -> list[torch.Tensor]:
        together.wait(60)
        return [generated(shared, prompt) for _ in range(2)]

    with ThreadPoolExecutor(THREADS) as pool:
        for results, alone in zip(pool.map(run, PROMPTS), expected, strict=True):
            assert all(torch.equal(result, alone) for result in results)
