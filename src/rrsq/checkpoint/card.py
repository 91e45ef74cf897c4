"""The model card (README.md) of a checkpoint."""

from __future__ import annotations

import yaml

from ..quantization.report import QuantizationReport
from .describe import (
    describe_activations,
    describe_cache,
    describe_calibration,
    describe_exceptions,
    describe_head,
    describe_rotation,
    describe_weights,
)
from .format import CheckpointInfo

__all__ = ["model_card"]


def model_card(info: CheckpointInfo, report: QuantizationReport) -> str:
    """Markdown with the Hub's metadata block: what was done, what it took, and how to run it."""
    recipe = info.recipe
    exceptions = describe_exceptions(info)
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
        f"| weights | {describe_weights(info)} |",
        f"| activations | {describe_activations(info)} |",
        f"| KV cache | {describe_cache(info)} |",
        f"| output head | {describe_head(info)} |",
        *([f"| except | {exceptions} |"] if exceptions else []),
        f"| rotation | {describe_rotation(info)} |",
        f"| calibration | {describe_calibration(info)} |",
        f"| size | {report.bytes_before / 1e6:.1f} MB before, {report.bytes_after / 1e6:.1f} MB after |",
        f"| seed | {info.seed} |",
        f"| made with | {', '.join(f'{name} {number}' for name, number in info.versions.items())} |",
    ]
    if report.fallbacks:
        lines += ["", f"Rounded to nearest because GPTQ could not be used: {', '.join(report.fallbacks)}."]
    if report.undersampled_experts:
        experts = "; ".join(report.undersampled_experts)
        text = "Experts that the router sent few tokens in calibration, so that others' were used as well"
        lines += ["", f"{text}: {experts}."]
    if any(layer.output_snr_db is not None for layer in report.layers):
        lines += [
            "",
            "Output error of each layer on the calibration text, against full precision on the same inputs:",
        ]
        lines += ["", "| layer | output SNR (dB) | KV cache: relative error of attention |", "|---|---|---|"]
        for layer in report.layers:
            snr = "" if layer.output_snr_db is None else f"{layer.output_snr_db:.1f}"
            cache = "" if layer.cache_error is None else f"{layer.cache_error:.4f}"
            lines.append(f"| {layer.index} | {snr} | {cache} |")
    return "\n".join(lines) + "\n"
