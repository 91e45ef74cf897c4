"""The model card (README.md) of a checkpoint."""

from __future__ import annotations

import yaml

from ..quantization.report import QuantizationReport
from .format import CheckpointInfo

__all__ = ["model_card"]


def model_card(info: CheckpointInfo, report: QuantizationReport) -> str:
    """Markdown with the Hub's metadata block: what was done, what it took, and how to run it."""
    recipe = info.recipe
    head = yaml.safe_dump(
        {"library_name": "transformers", "tags": ["rrsq", "4-bit", "w4a4"], "base_model": info.source_model},
        sort_keys=False,
    )
    lines = [
        "---",
        head.rstrip(),
        "---",
        f"# {info.source_model}, quantized with rrsq ({recipe.name})",
        "",
        recipe.description or "A custom recipe.",
        "",
        "```python",
        "import rrsq  # registers the format with transformers",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("this/folder", device_map="auto")',
        'tokenizer = AutoTokenizer.from_pretrained("this/folder")',
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| weights | INT4, {recipe.weights.method.upper()}{_groups(recipe.weights.group_size)} |",
        f"| activations | {_activations(info)} |",
        f"| KV cache | {_cache(info)} |",
        f"| rotation | {_rotation(info)} |",
        f"| calibration | {_calibration(info)} |",
        f"| size | {report.bytes_before / 1e6:.1f} MB before, {report.bytes_after / 1e6:.1f} MB after |",
        f"| seed | {info.seed} |",
        f"| made with | {', '.join(f'{name} {number}' for name, number in info.versions.items())} |",
    ]
    if report.fallbacks:
        lines += ["", f"Rounded to nearest because GPTQ could not be used: {', '.join(report.fallbacks)}."]
    if any(layer.output_snr_db is not None for layer in report.layers):
        lines += ["", "Output error of each layer on the calibration text, against full precision on the same inputs:"]
        lines += ["", "| layer | output SNR (dB) | KV cache: relative error of attention |", "|---|---|---|"]
        for layer in report.layers:
            snr = "" if layer.output_snr_db is None else f"{layer.output_snr_db:.1f}"
            cache = "" if layer.cache_error is None else f"{layer.cache_error:.4f}"
            lines.append(f"| {layer.index} | {snr} | {cache} |")
    return "\n".join(lines) + "\n"


def _groups(size: int | None) -> str:
    return ", one scale a row" if size is None else f", groups of up to {size} with integer multipliers"


def _activations(info: CheckpointInfo) -> str:
    activations = info.recipe.activations
    if activations.bits == 16:
        return "16 bits"
    smoothing = activations.smoothing
    if smoothing is None:
        return f"INT{activations.bits}, one scale a token"
    fold = "integer-folded scales" if smoothing.fold == "integer" else "real scales"
    return (
        f"INT{activations.bits}, runtime smoothing of {smoothing.scope} scope, groups of up to"
        f" {smoothing.group_size}, {fold}"
    )


def _cache(info: CheckpointInfo) -> str:
    cache = info.recipe.kv_cache
    if cache is None:
        return "16 bits"
    wide = [index for index, bits in enumerate(info.key_bits) if bits != cache.keys.bits]
    text = f"INT{cache.keys.bits} keys, INT{cache.values.bits} values"
    return f"{text}; 8-bit keys in layers {', '.join(map(str, wide))}" if wide else text


def _rotation(info: CheckpointInfo) -> str:
    found = {name: plan for name, plan in info.rotation if plan is not None}
    if not found:
        return "none"
    return "; ".join(
        f"{name.replace('_', ' ')} ({plan.size}{'' if plan.block == plan.size else f', blocks of {plan.block}'})"
        for name, plan in found.items()
    )


def _calibration(info: CheckpointInfo) -> str:
    calibration = info.calibration
    if calibration is None:
        return "none needed"
    return f"{calibration.num_samples} windows of {calibration.sequence_length} tokens of {calibration.source}"
