"""The model card (README.md) of a checkpoint."""

from __future__ import annotations

import yaml

from ...recipe import Recipe
from ...runtime.format.describe import (
    LAYER_COLUMNS,
    describe_activations,
    describe_cache,
    describe_calibration,
    describe_exceptions,
    describe_head,
    describe_layers,
    describe_rotation,
    describe_weights,
)
from ...runtime.format.format import CheckpointInfo
from ..report import QuantizationReport

__all__ = ["model_card"]


def model_card(info: CheckpointInfo, report: QuantizationReport) -> str:
    """Markdown with the Hub's metadata block: how to run the model, what was done, and what it cost."""
    recipe = info.recipe
    head = {"library_name": "transformers", "tags": ["rrsq", *_tags(recipe)], "base_model": info.source_model}
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).rstrip(),
        "---",
        f"# {info.source_model}, quantized with rrsq ({recipe.name})",
        "",
        recipe.description or "A custom recipe.",
        "",
        "## How to run it",
        "",
        "```python",
        "import rrsq  # registers the format with transformers",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("this/folder", device_map="auto")',
        'tokenizer = AutoTokenizer.from_pretrained("this/folder")',
        "```",
        "",
        'or `rrsq generate this/folder "Once upon a time"`. Without the import, transformers stops at'
        " a tensor of another shape than the model's.",
        "",
        "or, as a server with continuous batching, with [vLLM](https://docs.vllm.ai) on a GPU:",
        "",
        "```bash",
        "pip install 'rrsq[vllm]'",
        "rrsq serve this/folder",
        "```",
        "",
        "## What was done",
        "",
        *_table(["", ""], _facts(info, report)),
    ]
    if report.fallbacks:
        lines += ["", f"Rounded to nearest because GPTQ could not be used: {', '.join(report.fallbacks)}."]
    if report.undersampled_experts:
        experts = "; ".join(report.undersampled_experts)
        text = "Experts that the router sent few tokens in calibration, so that others' were used as well"
        lines += ["", f"{text}: {experts}."]
    headings, rows = describe_layers(info)
    if len(headings) > 1:
        lines += ["", "## Error of each layer", "", LAYER_COLUMNS, "", *_table(headings, rows)]
    lines += ["", "## Recipe", "", "Saved as a file, this is what `rrsq quantize --recipe FILE` takes:", ""]
    lines += ["```yaml", yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False).rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _tags(recipe: Recipe) -> list[str]:
    name = f"w{recipe.weights.bits}a{recipe.activations.bits}"
    if recipe.kv_cache is not None:
        name += f"kv{recipe.kv_cache.keys.bits}"
    return ["4-bit", name] if "4" in name else [name]


def _facts(info: CheckpointInfo, report: QuantizationReport) -> list[list[str]]:
    before, after = report.bytes_before, report.bytes_after
    exceptions, calibration = describe_exceptions(info), info.calibration
    return [
        ["weights", describe_weights(info)],
        ["activations", describe_activations(info)],
        ["KV cache", describe_cache(info)],
        ["output head", describe_head(info)],
        *([["except", exceptions]] if exceptions else []),
        ["rotation", describe_rotation(info)],
        ["calibration", describe_calibration(info)],
        *([["calibration tokens, SHA-256", calibration.fingerprint]] if calibration else []),
        ["size", f"{before / 1e6:.1f} MB before, {after / 1e6:.1f} MB after"],
        ["seed", str(info.seed)],
        ["made with", ", ".join(f"{name} {number}" for name, number in info.versions.items())],
    ]


def _table(headings: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (headings, ["---"] * len(headings), *rows)]
