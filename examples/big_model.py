"""Quantize a random model of a large one's shape, made shard by shard; print time by part and peak memory.

    python examples/big_model.py make /tmp/8b --shape Llama-3-8B
    python examples/big_model.py quantize /tmp/8b /tmp/8b-w4 --num-samples 128 --sequence-length 2048

``--layers`` makes fewer decoder layers than the shape has. ``project`` prints the projected peak of memory of
any shape, without making anything. With several GPUs, start ``quantize`` with torchrun.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from rrsq.models.llama import LLAMA
from rrsq.quantizer.calibration.windows import data_fingerprint
from rrsq.quantizer.calibration.workers import joined_workers
from rrsq.quantizer.options import QuantizationOptions
from rrsq.quantizer.production.produce import Calibration, OutputOptions, SourceModel, produce_checkpoint
from rrsq.quantizer.production.source import empty_model
from rrsq.quantizer.projection import projected_memory
from rrsq.recipe import load_recipe
from rrsq.runtime.format.format import CalibrationInfo


class NoTokenizer:
    """Random weights need no words."""

    def save_pretrained(self, folder: Path) -> None:
        """Nothing to save."""


def config_of(shape: str, layers: int | None) -> LlamaConfig:
    """A Llama of a public model's sizes."""
    sizes = LLAMA.public[shape]
    return LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        num_hidden_layers=layers or sizes.layers,
        vocab_size=128256 if shape.startswith("Llama-3") else 32000,
        max_position_embeddings=8192,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def make(folder: Path, shape: str, layers: int | None) -> None:
    """Write random bfloat16 weights, one decoder layer a shard; no more than one shard is in memory."""
    folder.mkdir(parents=True)
    config = config_of(shape, layers)
    config.save_pretrained(folder)
    shards: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, tensor in empty_model(config, torch.bfloat16).state_dict().items():
        parts = name.split(".")
        shards[parts[2] if parts[1] == "layers" else name][name] = tensor
    weight_map: dict[str, str] = {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for number, tensors in enumerate(shards.values(), start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        generator = torch.Generator(device).manual_seed(number)
        made = {
            name: torch.ones(tensor.shape, dtype=tensor.dtype)
            if tensor.ndim == 1
            else torch.empty_like(tensor, device=device).normal_(std=0.02, generator=generator).cpu()
            for name, tensor in tensors.items()
        }
        save_file(made, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(made, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


class Clock:
    """Sums the time between steps by layer and by what the step was, and watches the process's memory."""

    def __init__(self) -> None:
        self.seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.last = time.perf_counter()
        self.peak = 0
        self.done = threading.Event()
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()

    def step(self, done: int, total: int, per_layer: int, text: str) -> None:
        """A step is over (or, without totals, something begins)."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        layer, _, what = text.rpartition(": ")
        self.seconds[what][layer] += now - self.last
        self.last = now

    def _watch(self) -> None:
        process = psutil.Process()
        while not self.done.wait(0.1):
            info = process.memory_full_info() if hasattr(process, "memory_full_info") else None
            # Private pages: pages of files that are mapped are not memory that is needed.
            self.peak = max(self.peak, info.uss if info else process.memory_info().rss)


def quantize(source: Path, out: Path, options: argparse.Namespace) -> None:
    """Quantize on random tokens and print what it took."""
    config = LlamaConfig.from_pretrained(source)
    generator = torch.Generator().manual_seed(0)
    shape = (options.num_samples, options.sequence_length)
    windows = torch.randint(config.vocab_size, shape, generator=generator)
    info = CalibrationInfo(
        source="random tokens",
        num_samples=shape[0],
        sequence_length=shape[1],
        fingerprint=data_fingerprint(windows),
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = load_recipe(options.recipe, ())
    clock = Clock()
    start = time.perf_counter()
    with joined_workers(torch.device(device)) as workers:
        produced = produce_checkpoint(
            SourceModel(str(source), NoTokenizer()),  # type: ignore[arg-type]
            recipe,
            OutputOptions(out, offload=options.offload_dir),
            Calibration(windows, info),
            QuantizationOptions(device=device, workers=workers),
            on_step=clock.step,
            on_note=print,
        )
    total = time.perf_counter() - start
    clock.done.set()
    clock.watcher.join()
    if workers.rank:
        return
    activations = windows.numel() * config.hidden_size * 2 // workers.count
    print(f"{total:.1f} s in all, {config.num_hidden_layers} layers, {device}, {workers.count} processes")
    for name, by_layer in clock.seconds.items():
        # The median leaves out the first layer, for which kernels are compiled.
        print(f"  {name:24} {sum(by_layer.values()):8.1f} s, median {median(by_layer.values()):.2f} s")
    print(f"peak memory {clock.peak / 2**30:.2f} GiB, activations {activations / 2**30:.2f} GiB of it")
    if produced.report.peak_gpu_memory is not None:
        print(f"peak GPU memory {produced.report.peak_gpu_memory / 2**30:.2f} GiB")


def project(shape: str, options: argparse.Namespace) -> None:
    """Print the projected peak."""
    model = empty_model(config_of(shape, 1), torch.bfloat16)
    recipe = load_recipe(options.recipe, ())
    peak = projected_memory(model, recipe, options.num_samples, options.sequence_length)
    print(f"{shape}: {peak.describe('cuda')} {peak.activations / 1e9:.1f} GB of it activations.")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("folder", type=Path)
    making.add_argument("--layers", type=int)
    running = commands.add_parser("quantize")
    running.add_argument("source", type=Path)
    running.add_argument("out", type=Path)
    running.add_argument("--offload-dir", type=Path)
    projecting = commands.add_parser("project")
    for command in (making, projecting):
        command.add_argument("--shape", choices=sorted(LLAMA.public), default="Llama-3-8B")
    for command in (running, projecting):
        command.add_argument("--recipe", default="rrs-w4a4kv4")
        command.add_argument("--num-samples", type=int, default=128)
        command.add_argument("--sequence-length", type=int, default=2048)
    options = parser.parse_args()
    if options.command == "make":
        make(options.folder, options.shape, options.layers)
    elif options.command == "quantize":
        quantize(options.source, options.out, options)
    else:
        project(options.shape, options)


if __name__ == "__main__":
    main()
