"""Recipes that can be exported, with what sets each apart."""

from __future__ import annotations

__all__ = ["CASES"]

# By name: a recipe, and overrides of it.
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "groups of two sizes": ("w4a16-rotated", ()),
    "one scheme": ("w4a16-rotated", ("weights.group_size=64",)),
    "a tied head": ("gptq-w4a16", ("weights.group_size=32",)),
    "larger groups than Marlin's": ("w4a16-rotated", ("weights.group_size=256",)),
    "zero points": ("w4a16-rotated", ("weights.group_size=32", "weights.signed=true")),
    "a scale a row, 8-bit head": ("w4a16-rotated", ("weights.group_size=null", "head.bits=8")),
    "4-bit head": ("w4a16-rotated", ("weights.group_size=32", "head.bits=4")),
    "balanced": (
        "gptq-w4a16",
        (
            "rotation={residual: false, across_heads: false, intermediate: false, blocks: 1, balance: true}",
            "weights.group_size=64",
        ),
    ),
    "int8 inputs": ("w4a16-rotated", ("activations.bits=8", "weights.group_size=32")),
    "int8 inputs, signed multipliers": (
        "gptq-w4a16",
        ("activations.bits=8", "weights.group_size=32", "weights.signed=true"),
    ),
    "int8 inputs, 8-bit head": ("w4a16-rotated", ("activations.bits=8", "head.bits=8")),
    "mixed": (
        "w4a16-rotated",
        (
            "weights.group_size=32",
            "modules_to_not_convert=['*.0.self_attn.o_proj']",
            "overrides=[{match: '*.1.mlp.down', activations: {bits: 8}}]",
        ),
    ),
}
