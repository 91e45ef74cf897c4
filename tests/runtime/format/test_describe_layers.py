"""What a checkpoint says of its layers: in config.json, the model card and the table of ``rrsq inspect``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rrsq.quantizer.pipeline import QuantizedModel
from rrsq.recipe import parse_recipe
from rrsq.runtime.format.describe import describe_layers
from rrsq.runtime.format.format import CheckpointInfo, RotationInfo, parse_info
from tiny_quantized import recipe_of

INPUTS = ("qkv", "o", "gate_up", "down")


def table_of(card: str, first_heading: str) -> list[list[str]]:
    """The cells of the Markdown table whose first heading is this one, headings included."""
    lines = card.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_heading} |"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [rows[0], *rows[2:]]


def test_the_numbers_of_the_run_are_stored(qwen2_checkpoint: Path, quantized_qwen2: QuantizedModel) -> None:
    config = json.loads((qwen2_checkpoint / "config.json").read_text(encoding="utf-8"))
    info = parse_info(config["quantization_config"])
    layers = quantized_qwen2.report.layers
    assert len(layers) == 2
    for layer, snr, weights, cache in zip(
        layers, info.layer_snr_db, info.weight_snr_db, info.cache_error, strict=True
    ):
        assert snr == pytest.approx(layer.output_snr_db, abs=0.01)
        assert {path.rsplit(".", 1)[-1] for path in weights} == set(INPUTS)
        assert weights == pytest.approx(layer.weight_snr_db, abs=0.01)
        assert cache == pytest.approx(layer.cache_error, abs=1e-4)


def test_the_card_has_the_numbers_of_each_layer(
    qwen2_checkpoint: Path, quantized_qwen2: QuantizedModel
) -> None:
    card = (qwen2_checkpoint / "README.md").read_text(encoding="utf-8")
    headings, *rows = table_of(card, "layer")
    assert headings == [
        "layer",
        "output SNR (dB)",
        *(f"{name} weights (dB)" for name in INPUTS),
        "cache error",
        "key bits",
    ]
    for row, layer in zip(rows, quantized_qwen2.report.layers, strict=True):
        assert row[0] == str(layer.index)
        assert float(row[1]) == pytest.approx(layer.output_snr_db, abs=0.06)
        assert [float(cell) for cell in row[2:6]] == pytest.approx(
            list(layer.weight_snr_db.values()), abs=0.06
        )
        assert float(row[6].rstrip("%")) == pytest.approx(100 * (layer.cache_error or 0), abs=0.006)
        assert row[7] == "4"


def test_the_cards_recipe_is_the_recipe(qwen2_checkpoint: Path) -> None:
    card = (qwen2_checkpoint / "README.md").read_text(encoding="utf-8")
    block = card.split("```yaml\n")[1].split("```")[0]
    assert parse_recipe(yaml.safe_load(block), "the card") == recipe_of("rrs-w4a4kv4")


def test_inspect_has_the_same_table(qwen2_checkpoint: Path) -> None:
    card = (qwen2_checkpoint / "README.md").read_text(encoding="utf-8")
    config = json.loads((qwen2_checkpoint / "config.json").read_text(encoding="utf-8"))
    headings, rows = describe_layers(parse_info(config["quantization_config"]))
    assert [headings, *rows] == table_of(card, "layer")


@pytest.mark.parametrize(
    ("name", "tags"),
    [
        ("rrs-w4a8kv4", ["rrsq", "4-bit", "w4a8kv4"]),
        ("gptq-w4a16", ["rrsq", "4-bit", "w4a16"]),
        ("w16a16kv4", ["rrsq", "4-bit", "w16a16kv4"]),
    ],
)
def test_the_cards_tags_are_the_recipes(name: str, tags: list[str]) -> None:
    from rrsq.quantizer.outcome import QuantizationReport
    from rrsq.quantizer.production.writer import model_card

    info = CheckpointInfo(recipe=recipe_of(name), rotation=RotationInfo(), source_model="source: odd")
    head = yaml.safe_load(model_card(info, QuantizationReport()).split("---\n")[1])
    assert head == {"library_name": "transformers", "tags": tags, "base_model": "source: odd"}


def test_columns_without_numbers_are_left_out() -> None:
    info = CheckpointInfo(
        recipe=recipe_of("rrs-w4a4kv4"),
        rotation=RotationInfo(),
        layer_snr_db=(None, None),
        weight_snr_db=({"qkv": 20.04}, {"o": 7.96}),
        cache_error=(None, 0.0123),
    )
    assert describe_layers(info) == (
        ["layer", "qkv weights (dB)", "o weights (dB)", "cache error"],
        [["0", "20.0", "", ""], ["1", "", "8.0", "1.23%"]],
    )


def test_inputs_of_one_name_are_told_apart_by_their_paths() -> None:
    info = CheckpointInfo(
        recipe=recipe_of("rrs-w4a4kv4"),
        rotation=RotationInfo(),
        weight_snr_db=({"self_attn.o": 9.0, "mlp.down": 20.0}, {"self_attn.o": 9.5, "mlp.shared.down": 21.0}),
    )
    headings, rows = describe_layers(info)
    assert headings == [
        "layer",
        "self_attn.o weights (dB)",
        "mlp.down weights (dB)",
        "mlp.shared.down weights (dB)",
    ]
    assert rows == [["0", "9.0", "20.0", ""], ["1", "9.5", "", "21.0"]]
