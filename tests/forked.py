"""Processes forked from a server that has imported what they need, so that a start takes little time."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterable
from multiprocessing.context import ForkServerProcess
from typing import Any

__all__ = ["exit_codes", "forked", "torchrun_environments"]

PRELOADED = [
    "killed_run",
    "accelerate",
    "rrsq.quantizer.production.produce",
    "rrsq.cli.app",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.tokenization_utils_tokenizers",
]


def forked(
    target: Callable[..., Any], *arguments: Any, environment: dict[str, str] | None = None
) -> ForkServerProcess:
    """A process that has begun to run ``target``, silently, with the variables of now and these."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # The server keeps the variables that were there when it was started.
    variables = {**os.environ, **(environment or {})}
    process = context.Process(target=_quiet, args=(target, arguments, variables), daemon=True)
    process.start()
    return process


def _quiet(target: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    target(*arguments)


def torchrun_environments(count: int) -> list[dict[str, str]]:
    """The variables that ``torchrun`` gives to each of ``count`` processes on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def exit_codes(processes: Iterable[ForkServerProcess], seconds: float) -> list[int | None]:
    """Wait for all, in all so long; what is not at its end by then is killed and has None."""
    processes = list(processes)
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes
