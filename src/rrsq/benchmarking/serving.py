"""Whole models in vLLM, on random weights of a shape: a decode step, a prefill, memory, room for the cache.

Each contender is a folder with a ``config.json`` and no weights, which vLLM makes up, in a process of its
own: what one leaves behind (compiled code, memory) is not the next one's. Integers are made random as well,
since products of zeros take less power, and so less time.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..models import family_for
from ..recipe import Recipe
from ..runtime.format.format import CheckpointInfo, RotationInfo
from ..runtime.rotation.rotations import make_rotations
from ..runtime.scheme import head_is_kept

__all__ = ["CONTENDERS", "Load", "Measurement", "Served", "describe", "measure_in_process"]

_STEPS = 128
_REPEATS = 2
_COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"]}
_INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
_FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}


def _compressed(activations: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": _INT4, "input_activations": activations}
    return {**_COMPRESSED, "config_groups": {"group_0": group}}


# What stands in config.json beside the shape, and options of the engine.
CONTENDERS: Mapping[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "bf16": (None, {}),
    "fp8": (None, {"quantization": "fp8"}),
    "w4a16": (_compressed(None), {}),
    "w4afp8": (_compressed(_FP8), {}),
}
"""vLLM's own: 16 bits, FP8, 4-bit weights with 16-bit activations (Marlin) and with FP8 ones (CUTLASS)."""


@dataclass(frozen=True)
class Load:
    """Requests at once, and tokens of the prompt of each."""

    batch: int
    context: int


@dataclass(frozen=True)
class Measurement:
    """Milliseconds of a load.

    Attributes:
        decode: one step, the mean of many.
        prefill: all prompts and the first token of each.
    """

    batch: int
    context: int
    decode: float
    prefill: float


@dataclass(frozen=True)
class Served:
    """What a contender took.

    Attributes:
        name: of the contender.
        device: the GPU.
        weight_bytes: of one process.
        cache_tokens: that fit into the cache of one engine.
        start_seconds: from nothing to the first request.
        measurements: one a load.
    """

    name: str
    device: str
    weight_bytes: int
    cache_tokens: int
    start_seconds: float
    measurements: list[Measurement] = field(default_factory=list)


def describe(config: Any, recipe: Recipe) -> dict[str, Any]:
    """``config.json`` of what a recipe makes of a model."""
    family = family_for(config)
    sizes = family.sizes(config)
    rotations = make_rotations(recipe.rotation, sizes, 0, folds_residual=family.folds_residual)
    cache = recipe.kv_cache
    info = CheckpointInfo(
        recipe=recipe,
        rotation=RotationInfo.model_validate(rotations.describe()),
        key_bits=() if cache is None else (cache.keys.bits,) * sizes.layers,
    )
    described = config.to_dict()
    if rotations.residual is not None or not head_is_kept(recipe, family):
        described["tie_word_embeddings"] = False
    return {**described, "quantization_config": info.model_dump(mode="json")}


def measure_in_process(
    name: str, description: Mapping[str, Any], loads: Sequence[Load], engine: Mapping[str, Any]
) -> Served:
    """Start a process, have vLLM serve random weights in it, and time that.

    Args:
        name: of the contender.
        description: its ``config.json``.
        loads: what to time.
        engine: options of vLLM's ``LLM``.

    Raises:
        UsageError: the engine did not start, or stopped; with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "config.json").write_text(json.dumps(description), encoding="utf-8")
        job = {"name": name, "loads": [asdict(load) for load in loads], "engine": dict(engine)}
        (path / "job.json").write_text(json.dumps(job), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", __name__, folder],
            capture_output=True,
            text=True,
            env={**_ENVIRONMENT, **os.environ},
            check=False,
        )
        result = path / "result.json"
        if not result.exists():
            said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            raise UsageError(f"{name} did not run in vLLM: " + " | ".join(said[-8:]))
        data = json.loads(result.read_text(encoding="utf-8"))
    data["measurements"] = [Measurement(**each) for each in data["measurements"]]
    return Served(**data)


_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # The functions below are handed to the workers.
}


def fill(model: Any) -> int:
    """Make a model's integers random; its bytes come back. Runs in vLLM's workers."""
    import torch

    generator: dict[Any, Any] = {}
    total = 0
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        total += tensor.numel() * tensor.element_size()
        leaf = name.rpartition(".")[2]
        if tensor.device not in generator:
            generator[tensor.device] = torch.Generator(tensor.device).manual_seed(0)
        if leaf == "weight_multiplier":
            tensor.random_(1, 16, generator=generator[tensor.device])
        elif leaf == "weight_scale" and tensor.dtype == torch.float32:
            tensor.fill_(1e-3)
        elif leaf.startswith(("weight_packed", "weight_int8", "qweight")) and not tensor.is_floating_point():
            tensor.view(torch.uint8).random_(0, 256, generator=generator[tensor.device])
    return total


def _measure(folder: Path) -> Served:
    import torch

    from vllm import LLM

    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    loads = [Load(**load) for load in job["loads"]]
    begin = time.perf_counter()
    options = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "max_model_len": max(load.context for load in loads) + _STEPS + 8,
        "max_num_seqs": max(128, *(load.batch for load in loads)),
    }
    engine: Any = LLM(model=str(folder), **{**options, **job["engine"]})
    weight_bytes = engine.apply_model(fill)[0]
    started = time.perf_counter() - begin
    cache = engine.llm_engine.vllm_config.cache_config
    served = Served(
        job["name"],
        torch.cuda.get_device_name(),
        weight_bytes,
        int(cache.num_gpu_blocks or 0) * int(cache.block_size or 0),
        started,
    )
    for load in loads:
        _run(engine, load, 4)
        first = min(_run(engine, load, 1) for _ in range(_REPEATS))
        all_steps = min(_run(engine, load, _STEPS + 1) for _ in range(_REPEATS))
        milliseconds = (1e3 * (all_steps - first) / _STEPS, 1e3 * first)
        served.measurements.append(Measurement(load.batch, load.context, *milliseconds))
    return served


def _run(engine: Any, load: Load, tokens: int) -> float:
    """Seconds until each of the requests has its tokens."""
    from vllm import SamplingParams

    vocabulary = engine.llm_engine.vllm_config.model_config.get_vocab_size()
    prompts = [
        {"prompt_token_ids": random.choices(range(vocabulary), k=load.context)} for _ in range(load.batch)
    ]
    sampling = SamplingParams(
        max_tokens=tokens, min_tokens=tokens, ignore_eos=True, temperature=0, detokenize=False
    )
    begin = time.perf_counter()
    engine.generate(prompts, sampling, use_tqdm=False)
    return time.perf_counter() - begin


if __name__ == "__main__":
    _folder = Path(sys.argv[1])
    (_folder / "result.json").write_text(json.dumps(asdict(_measure(_folder))), encoding="utf-8")
