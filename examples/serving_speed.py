"""Time a model's shape in vLLM: a recipe of rrsq beside bfloat16, FP8 and 4-bit weights (Marlin, CUTLASS).

    python examples/serving_speed.py --shape Llama-3-8B
    python examples/serving_speed.py --shape Llama-3-8B --set head.bits=8 --loads 1x128,64x1024
    python examples/serving_speed.py --shape Qwen3-30B-A3B --layers 16 --against bf16,fp8
    python examples/serving_speed.py --shape Llama-3-8B --tensor-parallel-size 2 --set rotation.shards=2

All weights are random, made on the GPU; nothing is downloaded or written. A row's ratios are to the first
contender in the same run: above 1 is faster. Needs an NVIDIA GPU, vLLM, and rrsq installed beside it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, Qwen3MoeConfig

from rrsq.benchmarking.serving import CONTENDERS, Load, Served, describe, measure_in_process
from rrsq.errors import UsageError
from rrsq.models import families
from rrsq.recipe import load_recipe

LOADS = "1x128,1x4096,16x1024,64x1024"


def config_of(shape: str, layers: int | None) -> Any:
    """A configuration of a public model's sizes."""
    for family in families():
        sizes = family.public.get(shape)
        if sizes is None or family.model_type not in ("llama", "qwen3_moe"):
            continue
        common = {
            "hidden_size": sizes.hidden,
            "num_attention_heads": sizes.heads,
            "num_key_value_heads": sizes.kv_heads,
            "head_dim": sizes.head_dim,
            "num_hidden_layers": layers or sizes.layers,
            "max_position_embeddings": 40960,
            "architectures": [family.architecture],
            "dtype": "bfloat16",
        }
        if family.model_type == "llama":
            vocabulary = 128256 if shape.startswith("Llama-3") else 32000
            return LlamaConfig(**common, intermediate_size=sizes.intermediate, vocab_size=vocabulary)
        return Qwen3MoeConfig(
            **common,
            moe_intermediate_size=sizes.intermediate,
            num_experts=128,
            num_experts_per_tok=8,
            norm_topk_prob=True,
            vocab_size=151936,
        )
    raise SystemExit(f"no shape '{shape}': those of Llama and Qwen3-MoE in docs/models.md are known here")


def table(rows: list[Served]) -> None:
    """Milliseconds and ratios to the first row."""
    base = rows[0]
    print(f"\n{base.device}; weights, room in the cache and start of each:")
    for row in rows:
        print(
            f"  {row.name:8} {row.weight_bytes / 1e9:6.2f} GB  {row.cache_tokens:9d} tokens"
            f"  {row.start_seconds:5.0f} s"
        )
    for kind in ("decode", "prefill"):
        print(f"\n{kind}, ms (ratio to {base.name})")
        print(f"  {'batch x context':16}" + "".join(f"{row.name:>18}" for row in rows))
        for index, first in enumerate(base.measurements):
            times = [getattr(row.measurements[index], kind) for row in rows]
            cells = "".join(f"{time:10.3f} ({times[0] / time:4.2f})" for time in times)
            print(f"  {first.batch:3d} x {first.context:<10d}{cells}")


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="Llama-3-8B")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--recipe", default="rrs-w4a4kv4")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--against", default="bf16,fp8,w4a16", help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--loads", default=LOADS, help="BATCHxCONTEXT, by commas")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.85)
    parser.add_argument("--engine", default="{}", help="further options of vLLM's LLM, as JSON")
    parser.add_argument("--json", type=Path, help="also write all numbers to this file")
    options = parser.parse_args()

    config = config_of(options.shape, options.layers)
    loads = [Load(*map(int, load.split("x"))) for load in options.loads.split(",")]
    engine = {
        "tensor_parallel_size": options.tensor_parallel_size,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        **json.loads(options.engine),
    }
    jobs: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
    for name in filter(None, options.against.split(",")):
        section, own = CONTENDERS[name]
        description = config.to_dict() | ({} if section is None else {"quantization_config": section})
        jobs.append((name, description, own))
    recipe = load_recipe(options.recipe, options.overrides)
    jobs.append(("rrsq", describe(config, recipe), {}))
    rows = []
    for name, description, own in jobs:
        try:
            rows.append(measure_in_process(name, description, loads, {**engine, **own}))
        except UsageError as error:
            print(f"{name}: {error}")
            continue
        for measured in rows[-1].measurements:
            print(name, json.dumps(asdict(measured)), flush=True)
    if rows:
        table(rows)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
