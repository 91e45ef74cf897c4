"""What stands beside the shards of a checkpoint: configuration, tokenizer, model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from ...models import family_for
from ...recipe import Recipe
from ...runtime.format.describe import (
    LAYER_COLUMNS,
    describe_activations,
    describe_cache,
    describe_calibration,
    describe_embedding,
    describe_exceptions,
    describe_head,
    describe_layers,
    describe_rotation,
    describe_weights,
)
from ...runtime.format.format import CalibrationInfo, CheckpointInfo, RotationInfo
from ...runtime.scheme import head_shares_codes
from ...storage import library_versions
from ..outcome import QuantizationReport
from ..pipeline import QuantizedModel
from .output_shards import OutputShards

__all__ = ["checkpoint_info", "copy_processor", "model_card", "write_beside"]

# How a model that sees wants its images, and where they stand in the text.
_PROCESSOR = ("preprocessor_config.json", "processor_config.json")


def checkpoint_info(
    quantized: QuantizedModel, *, seed: int, source_model: str, calibration: CalibrationInfo | None
) -> CheckpointInfo:
    """What ``config.json`` says of a quantized model."""
    layers = quantized.report.layers
    return CheckpointInfo(
        recipe=quantized.recipe,
        rotation=RotationInfo.model_validate(quantized.rotations.describe()),
        key_bits=tuple(quantized.key_bits),
        seed=seed,
        source_model=source_model,
        calibration=calibration,
        versions=library_versions(),
        layer_snr_db=tuple(_rounded(layer.output_snr_db, 2) for layer in layers),
        weight_snr_db=tuple(
            {name: round(snr, 2) for name, snr in layer.weight_snr_db.items()} for layer in layers
        ),
        cache_error=tuple(_rounded(layer.cache_error, 4) for layer in layers),
    )


def _rounded(number: float | None, digits: int) -> float | None:
    return None if number is None else round(number, digits)


def write_beside(
    quantized: QuantizedModel, tokenizer: Any, info: CheckpointInfo, shards: OutputShards
) -> None:
    """Write all files of a checkpoint into the folder of its shards.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    folder = shards.folder
    model: Any = quantized.model
    model.config.quantization_config = info.model_dump(mode="json")
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    index = shards.index()
    if index is not None:
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    tokenizer.save_pretrained(folder)
    recipe = yaml.safe_dump(info.recipe.model_dump(mode="json"), sort_keys=False)
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    shared = head_shares_codes(quantized.recipe, family_for(model.config), model.config)
    (folder / "README.md").write_text(model_card(info, quantized.report, shared=shared), encoding="utf-8")


def copy_processor(source: Path, folder: Path) -> None:
    """Copy what prepares images for a model, where it has such files."""
    for name in _PROCESSOR:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def model_card(info: CheckpointInfo, report: QuantizationReport, *, shared: bool = False) -> str:
    """Markdown with the Hub's metadata block: how to run the model, what was done, and what it cost.

    ``shared``: the output head has the embedding's codes.
    """
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
        "As a server with continuous batching, with [vLLM](https://docs.vllm.ai) on a GPU:",
        "",
        "```bash",
        "pip install 'rrsq[vllm]'",
        "rrsq serve this/folder",
        "```",
        "",
        "## What was done",
        "",
        *_table(["", ""], _facts(info, report, shared=shared)),
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
    lines += ["", "## Recipe", "", "Also in `recipe.yaml`, which `rrsq quantize --recipe FILE` takes:", ""]
    lines += ["```yaml", yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False).rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _tags(recipe: Recipe) -> list[str]:
    name = f"w{recipe.weights.bits}a{recipe.activations.bits}"
    if recipe.kv_cache is not None:
        name += f"kv{recipe.kv_cache.keys.bits}"
    return ["4-bit", name] if "4" in name else [name]


def _facts(info: CheckpointInfo, report: QuantizationReport, *, shared: bool) -> list[list[str]]:
    before, after = report.bytes_before, report.bytes_after
    exceptions, calibration = describe_exceptions(info), info.calibration
    return [
        ["weights", describe_weights(info)],
        ["activations", describe_activations(info)],
        ["KV cache", describe_cache(info)],
        ["embedding", describe_embedding(info)],
        ["output head", describe_head(info, shared=shared)],
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
