"""Timing: medians over repeated runs, on the device's own clock where it has one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

__all__ = ["time_calls"]

_WARM_UP_SECONDS = 0.05
_LEAST_REPEATS = 7
_MOST_REPEATS = 100


def time_calls(
    calls: Sequence[Callable[[], object]], device: torch.device, seconds: float, cuda_graph: bool
) -> float:
    """Median time of one call, in microseconds.

    ``calls`` do the same work on different buffers, so that together they are larger than the caches; they
    are run in turn, and one measurement is all of them divided by their number.

    Args:
        calls: the work; every call is run once before anything is measured.
        device: where it runs.
        seconds: about how long to measure.
        cuda_graph: capture the calls in a CUDA graph and time its replays, which hides launch costs as a
            serving engine does. Ignored on CPUs.
    """
    if device.type == "cuda":
        return _time_on_cuda(calls, seconds, cuda_graph)
    for call in calls[:2]:
        call()
    return _median(lambda: _clock(calls), seconds) / len(calls)


def _clock(calls: Sequence[Callable[[], object]]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start) * 1e6


def _median(measure: Callable[[], float], seconds: float) -> float:
    first = measure()
    repeats = min(max(int(seconds * 1e6 / max(first, 1.0)), _LEAST_REPEATS), _MOST_REPEATS)
    return statistics.median([measure() for _ in range(repeats)])


def _time_on_cuda(calls: Sequence[Callable[[], object]], seconds: float, cuda_graph: bool) -> float:
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

    return _median(measure, seconds) / len(calls)


def _captured(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay
