"""The model card of an export."""

from __future__ import annotations

from typing import TYPE_CHECKING

import yaml

from ..runtime.format.describe import (
    describe_calibration,
    describe_exceptions,
    describe_rotation,
    describe_weights,
)
from ..runtime.format.format import CheckpointInfo

if TYPE_CHECKING:
    from .produce import ExportReport

__all__ = ["export_card"]


def export_card(info: CheckpointInfo, report: ExportReport) -> str:
    """Markdown with the Hub's metadata block: how to run the model, and what it was made from and how."""
    head = {
        "library_name": "transformers",
        "tags": ["compressed-tensors", "rrsq"],
        "base_model": info.source_model,
    }
    rows = [
        ["recipe of rrsq", info.recipe.name],
        ["weights", describe_weights(info)],
        *([["except", exceptions]] if (exceptions := describe_exceptions(info)) else []),
        ["rotation, folded into the weights", describe_rotation(info)],
        ["calibration", describe_calibration(info)],
        *([scheme, f"{count} linears"] for scheme, count in report.schemes.items()),
        ["scales and what is not quantized", report.dtype],
        ["largest relative error of a scale by rounding it", f"{report.scale_error:.2%}"],
        ["size", f"{report.bytes_after / 1e6:.1f} MB"],
    ]
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).rstrip(),
        "---",
        f"# {info.source_model}, quantized with rrsq ({info.recipe.name}), for compressed-tensors",
        "",
        "It needs no rrsq:",
        "",
        "```bash",
        "pip install vllm",
        "vllm serve this/folder",
        "```",
        "",
        "or, with `pip install compressed-tensors`, `AutoModelForCausalLM.from_pretrained` of transformers.",
        "",
        "## What was done",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in rows),
    ]
    if report.dropped_cache:
        lines += [
            "",
            "The checkpoint it was exported from has a quantized KV cache, and this model has not.",
        ]
    return "\n".join(lines) + "\n"
