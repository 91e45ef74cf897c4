"""Timing: medians over repeated runs, on the device's own clock where it has one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

__all__ = ["time_calls", "time_in_turn"]

Calls = Sequence[Callable[[], object]]

_WARM_UP_SECONDS = 0.05
_LEAST_REPEATS = 7
_MOST_REPEATS = 100


def time_calls(calls: Calls, device: torch.device, seconds: float, cuda_graph: bool) -> float:
    """Median time of one call, in microseconds; see :func:`time_in_turn`."""
    return time_in_turn([calls], device, seconds, cuda_graph)[0]


def time_in_turn(
    contenders: Sequence[Calls], device: torch.device, seconds: float, cuda_graph: bool
) -> list[float]:
    """Median time of one call of each contender, in microseconds.

    The calls of a contender do the same work on different buffers, so that together they are larger than the
    caches; they are run in turn, and one measurement is all of them divided by their number. Contenders are
    measured alternately, so that a clock that moves with heat and power moves for all of them: small
    differences between them show.

    Args:
        contenders: calls; the first two of each are run once before anything is measured.
        device: where they run.
        seconds: about how long to measure each contender.
        cuda_graph: capture the calls in a CUDA graph and time its replays, which hides launch costs as a
            serving engine does. Ignored on CPUs.
    """
    if device.type == "cuda":
        measures = [_cuda_measure(calls, cuda_graph) for calls in contenders]
    else:
        measures = [_cpu_measure(calls) for calls in contenders]
    first = sum(measure() for measure in measures) / len(measures)
    repeats = min(max(int(seconds * 1e6 / max(first, 1.0)), _LEAST_REPEATS), _MOST_REPEATS)
    rounds = [[measure() for measure in measures] for _ in range(repeats)]
    return [
        statistics.median(times) / len(calls)
        for times, calls in zip(zip(*rounds, strict=True), contenders, strict=True)
    ]


def _cpu_measure(calls: Calls) -> Callable[[], float]:
    """Microseconds of all calls, by the clock."""
    for call in calls[:2]:
        call()

    def measure() -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) * 1e6

    return measure


def _cuda_measure(calls: Calls, cuda_graph: bool) -> Callable[[], float]:
    """Microseconds of all calls, by the device's events."""
    stop = time.perf_counter() + _WARM_UP_SECONDS
    while True:
        for call in calls:
            call()
        torch.cuda.synchronize()
        if time.perf_counter() > stop:
            break
    run = _captured(calls) if cuda_graph else lambda: [call() for call in calls]

    def measure() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e3

    return measure


def _captured(calls: Calls) -> Callable[[], object]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay
