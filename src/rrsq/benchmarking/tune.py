"""Find the best plan of each product by trying a small set, and keep it in the user's cache."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch

from rrsq.errors import UsageError

from .contenders import quantize
from .linear_scheme import LinearScheme
from .problem import Problem, make_problems
from .shapes import LinearShape
from .timing import time_calls

__all__ = ["BUCKETS", "tune"]

BUCKETS = (1, 16, 64, 256, 2048, 8192)


def _candidates(tokens: int) -> list[object]:
    from rrsq.kernels.plans import FusedPlan, GemvPlan, TwoPassPlan

    plans: list[object] = []
    if tokens == 1:
        plans += [GemvPlan(chunks, warps) for chunks, warps in ((16, 1), (32, 2), (64, 4))]
    if tokens <= 64:
        sizes = [(min(max(tokens, 16), 64), 64, 4), (min(max(tokens, 16), 64), 128, 8)]
        plans += [
            FusedPlan(block_tokens, block_out, block_bytes, split, warps, stages)
            for block_tokens, block_out, warps in sizes
            for block_bytes, stages in ((128, 3), (128, 4), (256, 3))
            for split in (1, 2, 4, 8)
        ]
    elif tokens <= 256:
        sizes = [(64, 64, 128), (64, 128, 128), (128, 64, 128), (128, 128, 64)]
        plans += [
            FusedPlan(t, o, b, split, 4, stages) for t, o, b in sizes for split in (1, 2) for stages in (3, 4)
        ]
    if tokens >= 256:
        plans += [TwoPassPlan(128, 128, 128, band, 4, 3, True) for band in (8, 16, 32)]
        plans.append(TwoPassPlan(128, 128, 64, 16, 4, 4, False))
    return plans


def tune(
    shapes: list[LinearShape], device: torch.device, scheme: LinearScheme, progress: Callable[[str], None]
) -> str:
    """Time every candidate on each shape and number of tokens, and write the winners to the returned path.

    Raises:
        UsageError: the device has no plans to choose from.
    """
    if device.type != "cuda":
        raise UsageError("--tune needs a CUDA device: on a CPU there is nothing to choose.")
    from rrsq.kernels.plans import cache_path, plan_to_data, reload_tables

    path = cache_path(device)
    table = json.loads(path.read_text()) if path.is_file() else {"linear_int8": {}}
    table["gpu"] = torch.cuda.get_device_name(device)
    for shape in shapes:
        entries = table["linear_int8"].setdefault(str(shape), {})
        for tokens in BUCKETS:
            progress(f"tuning {shape} for {tokens} tokens")
            plan = _best(make_problems(tokens, shape, device, scheme), device, _candidates(tokens))
            entries[str(tokens)] = plan_to_data(plan)  # type: ignore[arg-type]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1))
    reload_tables()
    return str(path)


def _best(problems: list[Problem], device: torch.device, plans: list[object]) -> object:
    from rrsq.kernels.linear_int8 import launch

    inputs = []
    for problem in problems:
        operand, scale = quantize(problem, rotated=False)
        weight = problem.packed, problem.weight_scale, problem.multiplier, None
        inputs.append((operand, scale, *weight, torch.bfloat16))
    times = {}
    for plan in plans:
        calls = [lambda plan=plan, arguments=arguments: launch(*arguments, plan=plan) for arguments in inputs]
        try:
            times[plan] = time_calls(calls, device, 0.02, cuda_graph=True)
        except Exception as error:
            # A plan may need more shared memory than this GPU has; that rules it out and nothing else.
            if type(error).__name__ != "OutOfResources":
                raise
    return min(times, key=lambda plan: times[plan])
