"""Divergence over bits: budgets of --target-bits beside recipes that treat all layers alike.

    python examples/budget_curve.py MODEL -o FOLDER --bits 4.25,4.5,5 --activation-bits 4.5,5

Each checkpoint is kept in FOLDER, and the same command goes on where it was stopped. The recipes beside are
groups of 16, 32 and 128 with heads of 4, 8 and 16 bits for the weights, and for the activations 4 bits, 8
bits, and 8 bits for one of the four inputs in all layers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import rrsq
from rrsq.runtime.format.describe import checkpoint_linear_bits
from rrsq.runtime.format.loading import read_info

GROUPS, HEADS = (128, 32, 16), (4, 8, 16)
INPUTS = ("qkv", "o", "gate_up", "down")


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",") if part]


def checkpoints(options: argparse.Namespace) -> dict[str, dict[str, object]]:
    """Arguments of ``rrsq.quantize`` by the name of what they make."""
    found: dict[str, dict[str, object]] = {}
    if options.bits:
        for group in GROUPS:
            for head in HEADS:
                overrides = [f"weights.group_size={group}", f"head.bits={head}"]
                found[f"groups of {group}, head {head}"] = {"overrides": overrides}
        for bits in options.bits:
            found[f"budget of {bits:g}"] = {"target_bits": bits}
    if options.activation_bits:
        found["activations 4"] = {}
        found["activations 8"] = {"overrides": ["activations={bits: 8}"]}
        for name in INPUTS:
            override = f'overrides=[{{match: "*.{name}", activations: {{bits: 8}}}}]'
            found[f"activations 8 at {name}"] = {"overrides": [override]}
        for bits in options.activation_bits:
            found[f"activations {bits:g} by budget"] = {"target_activation_bits": bits}
    return {name: found[name] for name in found if not options.only or name in options.only}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--recipe", default="rrs-w4a4kv4")
    parser.add_argument("--bits", type=numbers, default=[])
    parser.add_argument("--activation-bits", type=numbers, default=[])
    parser.add_argument("--only", action="append", help="only what has this name")
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--limit", type=int, default=24, help="windows of the test text")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    wanted = checkpoints(options)
    folders = [options.output / name.replace(" ", "-").replace(",", "") for name in wanted]
    for folder, (name, arguments) in zip(folders, wanted.items(), strict=True):
        if folder.exists():
            continue
        print(f"{name} ...", flush=True)
        if name.startswith("budget") or "budget" in name:
            arguments = {**arguments, "sensitivities": options.output / "sensitivities.json"}
        rrsq.quantize(
            options.model,
            folder,
            recipe=options.recipe,
            num_samples=options.num_samples,
            sequence_length=options.sequence_length,
            device=options.device,
            on_note=lambda note: print(f"  {note}", flush=True),
            **arguments,  # type: ignore[arg-type]
        )
    report = rrsq.evaluate(
        [options.model, *folders],
        "kl",
        limit=options.limit,
        sequence_length=options.sequence_length,
        device=options.device,
        dtype="float32",
    )
    print("| | bits of linears | KL, nats | standard error |\n|---|---|---|---|")
    for name, folder, model in zip(wanted, folders, report.models[1:], strict=True):
        divergence = model.results[0].headline
        bits = checkpoint_linear_bits(folder, read_info(folder).recipe)
        print(f"| {name} | {bits} | {divergence.value:.4f} | {divergence.stderr:.4f} |")


if __name__ == "__main__":
    main()
