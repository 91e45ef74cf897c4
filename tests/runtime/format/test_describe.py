"""What card, inspect and summary say of rotations and exceptions."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from rrsq.cli.app import app
from rrsq.quantizer.pipeline import quantize_model
from rrsq.runtime.format.describe import (
    describe_activations,
    describe_embedding,
    describe_exceptions,
    describe_head,
    describe_rotation,
    describe_weights,
)
from rrsq.runtime.format.format import CheckpointInfo, RotationInfo
from tiny_families import tiny_model
from tiny_quantized import quantize_tiny, random_tokens, recipe_of, save_tiny

EXCEPTIONS = [
    "head.bits=8",
    "modules_to_not_convert=['*.layers.0.mlp.up_proj']",
    'overrides=[{match: "*.mlp.down", activations: {bits: 8}},'
    '{match: "*.self_attn.o", weights: {method: rtn, group_size: 8}}]',
]


def info_of(*overrides: str) -> CheckpointInfo:
    return CheckpointInfo(recipe=recipe_of("rrs-w4a4kv4", overrides), rotation=RotationInfo())


def test_a_plain_recipe_has_no_exceptions() -> None:
    info = info_of()
    assert describe_exceptions(info) == ""
    assert describe_head(info) == "INT8 weights, 16-bit activations"
    assert describe_embedding(info) == "INT8, one scale a row"
    full = info_of("head.bits=16", "embedding.bits=16")
    assert describe_head(full) == describe_embedding(full) == "16 bits"
    assert describe_rotation(info) == "none"
    assert describe_weights(info).startswith("INT4, GPTQ, groups of up to 32")
    assert describe_activations(info).startswith("INT4, signed levels")


def test_exceptions_are_named_with_their_patterns() -> None:
    info = info_of(*EXCEPTIONS)
    assert describe_exceptions(info) == (
        "*.mlp.down: activations INT8, one scale a token; *.self_attn.o: weights INT4, RTN, groups of up to 8"
        " with integer multipliers; *.layers.0.mlp.up_proj: full precision"
    )
    assert describe_head(info) == "INT8 weights, 16-bit activations"


@pytest.mark.parametrize(
    ("overrides", "embedding", "head"),
    [
        ([], "INT8, one scale a row", "tied: INT8 weights of the embedding"),
        (["embedding.bits=16", "head.bits=16"], "16 bits", "16 bits"),
        (
            ["embedding.bits=4", "head.bits=16"],
            "INT4, groups of up to 32 with signed multipliers",
            "tied: INT4 weights of the",
        ),
        (
            ["embedding={bits: 4, group_size: null}", "head.bits=16"],
            "INT4, one scale a row",
            "tied: INT4 weights",
        ),
        (["embedding.bits=4"], "INT4, groups of up to 32", "INT8 weights, 16-bit activations"),
        (["embedding.bits=4", "rotation.residual=true"], "INT4, groups of up to 32", "16 bits"),
    ],
)
def test_card_inspect_and_dry_run_say_what_the_embedding_is(
    overrides: list[str], embedding: str, head: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    recipe = "rrs1-w4a4kv4" if "rotation.residual=true" in overrides else "rrs-w4a4kv4"
    quantized = quantize_tiny(tiny_llama_dir, recipe_of(recipe, overrides))
    out = save_tiny(quantized, tiny_llama_dir, tmp_path / "out")
    options = [word for override in overrides for word in ("--set", override)]
    dry = ["quantize", str(tiny_llama_dir), "-o", "new", "--dry-run", "--recipe", recipe, *options]
    texts = [(out / "README.md").read_text(encoding="utf-8")]
    for words in (["inspect", str(out)], dry):
        done = CliRunner().invoke(app, words, env={"COLUMNS": "1000"})
        assert done.exit_code == 0, done.output
        texts.append(done.stdout)
    for text in texts:
        lines = [" ".join(line.replace("│", "|").split()).strip("| ") for line in text.splitlines()]
        assert any(line.startswith(f"embedding | {embedding}") for line in lines), text
        assert any(line.startswith(f"output head | {head}") for line in lines), text


@pytest.mark.parametrize("name", ["gemma2", "llama"])
def test_card_and_inspect_say_what_was_done(name: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    quantized = quantize_model(tiny_model(name), recipe_of("rrs1-w4a4kv4", EXCEPTIONS), random_tokens(2, 24))
    out = save_tiny(quantized, tiny_llama_dir, tmp_path / "out")
    card = (out / "README.md").read_text(encoding="utf-8")
    inspected = CliRunner().invoke(app, ["inspect", str(out)], env={"COLUMNS": "1000"})
    assert inspected.exit_code == 0
    for text in (card, inspected.stdout):
        assert "*.mlp.down: activations INT8" in text
        assert "INT8 weights" in text
        assert "*.layers.0.mlp.up_proj: full precision" in text
        online = "residual (60), online at the inputs of attention and MLP, since norms behind them"
        assert (online in text) == (name == "gemma2")
