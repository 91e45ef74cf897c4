"""Recipes: the named ones, overrides, unknown keys and combinations that make no sense."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rrsq.errors import RecipeError
from rrsq.recipe import INPUTS, Recipe, load_recipe, parse_recipe, recipe_names

NAMED = {
    "rtn-w4a4",
    "gptq-w4a16",
    "w4a16-rotated",
    "quarot-w4a4kv4",
    "rrs-paper-w4a4kv4",
    "rrs1-w4a8kv4",
    "rrs1-w4a4kv4",
    "rrs-w4a8kv4",
    "rrs-w4a4kv4",
}


def write(path: Path, data: object) -> str:
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return str(path)


def test_the_promised_recipes_are_there() -> None:
    assert set(recipe_names()) >= NAMED
    assert recipe_names() == sorted(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_every_named_recipe_parses_and_survives_json(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize(
    ("name", "activation_bits", "cache"),
    [("rtn-w4a4", 4, False), ("gptq-w4a16", 16, False), ("rrs-w4a8kv4", 8, True), ("rrs-w4a4kv4", 4, True)],
)
def test_a_recipe_does_what_its_name_says(name: str, activation_bits: int, cache: bool) -> None:
    recipe = load_recipe(name)
    assert recipe.weights.bits == 4
    assert recipe.activations.bits == activation_bits
    assert (recipe.kv_cache is not None) == cache
    assert recipe.kv_cache is None or recipe.kv_cache.keys.bits == recipe.kv_cache.values.bits == 4


@pytest.mark.parametrize("name", recipe_names())
def test_embedding_and_head_have_8_bits_in_the_second_generation_alone(name: str) -> None:
    """The others are there to be compared with what is published, which leaves both."""
    recipe = load_recipe(name)
    bits = 8 if name in ("rrs-w4a4kv4", "rrs-w4a8kv4") else 16
    assert (recipe.embedding.bits, recipe.head.bits) == (bits, bits)


def test_the_papers_recipe_smooths_what_the_authors_smooth() -> None:
    smoothing = load_recipe("rrs-paper-w4a4kv4").activations.smoothing
    assert smoothing is not None
    assert set(smoothing.inputs) == set(INPUTS) - {"qkv"}
    assert (smoothing.scope, smoothing.scales, smoothing.group_size) == ("sequence", "real", 128)


def test_overrides_set_nested_fields_and_read_values_as_yaml() -> None:
    recipe = load_recipe(
        "rrs-w4a4kv4",
        [
            "weights.group_size=null",
            "weights.act_order=false",
            "activations.smoothing.group_size=32",
            "activations.smoothing.inputs=[o, down]",
            "kv_cache.keys.bits=8",
            "name=mine",
        ],
    )
    assert recipe.weights.group_size is None
    assert recipe.weights.act_order is False
    assert recipe.activations.smoothing is not None
    assert recipe.activations.smoothing.group_size == 32
    assert recipe.activations.smoothing.inputs == ("o", "down")
    assert recipe.kv_cache is not None
    assert recipe.kv_cache.keys.bits == 8
    assert recipe.name == "mine"


def test_an_override_makes_a_section_that_the_recipe_lacks() -> None:
    recipe = load_recipe("rtn-w4a4", ["kv_cache.values.bits=8"])
    assert recipe.kv_cache is not None
    assert recipe.kv_cache.values.bits == 8


def test_a_yaml_file_takes_its_name_from_the_file(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path / "mine.yaml", {"weights": {"method": "rtn"}}))
    assert (recipe.name, recipe.weights.method) == ("mine", "rtn")


@pytest.mark.parametrize(
    ("data", "wrong", "nearest"),
    [
        ({"weigths": {}}, "weigths", "weights"),
        ({"weights": {"groupsize": 64}}, "weights.groupsize", "group_size"),
        ({"activations": {"smoothing": {"scop": "token"}}}, "activations.smoothing.scop", "scope"),
        ({"kv_cache": {"keys": {"zeropoint": True}}}, "kv_cache.keys.zeropoint", "zero_point"),
        ({"rotation": {"across_head": True}}, "rotation.across_head", "across_heads"),
    ],
)
def test_an_unknown_key_names_the_nearest_valid_one(
    tmp_path: Path, data: dict[str, object], wrong: str, nearest: str
) -> None:
    with pytest.raises(RecipeError, match=f"unknown key '{wrong}'. Did you mean '{nearest}'"):
        load_recipe(write(tmp_path / "r.yaml", data))
    path, value = wrong, data
    for key in wrong.split("."):
        value = value[key]  # type: ignore[assignment, index]
    with pytest.raises(RecipeError, match=f"Did you mean '{nearest}'"):
        load_recipe("rtn-w4a4", [f"{path}={value if value != {} else '{}'}"])


def test_a_key_like_no_other_lists_the_valid_ones() -> None:
    with pytest.raises(RecipeError, match=r"unknown key 'weights.xyzzy'. Valid keys: bits, method"):
        parse_recipe({"weights": {"xyzzy": 1}}, "here")


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("activations.smoothing.scope=sequence", "needs scope: token"),
        ("activations.smoothing.scope=block", "needs scope: token"),
        ("activations.smoothing.statistic=token_normalized_max", "needs statistic: max"),
        ("activations.smoothing.channel_order=calibrated", "needs channel_order: none"),
        ("activations.bits=8", "needs activations.bits: 4"),
        ("activations.bits=16", "signed needs bits of 4 or 8"),
        ("activations={bits: 16, smoothing: {}}", "needs activations.bits of 4 or 8"),
        ("activations.signed=false", "smoothing or clipping with rotation.blocks needs activations.signed"),
        ("activations={bits: 8, clip: 0.9}", "smoothing or clipping with rotation.blocks"),
        ("rotation={}", "activations.signed needs rotation.blocks, or rotation: null"),
        ("activations.bits=5", "activations.bits"),
        ("activations.clip=0", "activations.clip"),
        ("weights.bits=16", "needs activations.bits: 16 and rotation: null"),
        ("weights.bits=3", "weights.bits"),
        ("weights.damping=1.5", "weights.damping"),
        ("weights.group_size=1", "weights.group_size"),
        ("rotation.shards=0", "rotation.shards"),
        ("kv_cache.keys.bits=3", "kv_cache.keys.bits"),
        ("activations.smoothing.inputs=[q]", "activations.smoothing.inputs"),
        ("name=", "name"),
    ],
)
def test_inconsistent_or_impossible_values_are_refused(override: str, complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint) as caught:
        load_recipe("rrs-w4a4kv4", [override])
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("weights.group_size", "KEY=VALUE"),
        ("=3", "KEY=VALUE"),
        ("weights.method.x=3", "'method' is a value, not a section"),
        ("weights.group_size=[1", "not valid YAML"),
    ],
)
def test_an_assignment_that_is_none_is_refused(override: str, complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        load_recipe("rrs-w4a4kv4", [override])


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'rrs-w4a4kv4'") as caught:
        load_recipe("rrs-w4a4kv")
    assert all(name in str(caught.value) for name in NAMED)


@pytest.mark.parametrize("content", [b"[1, 2]", b"weights: {", b"\xff\xfe\x00", b""])
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=r"bad\.yaml"):
        load_recipe(str(path))


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_recipe("rtn-w4a4").weights.method = "gptq"  # type: ignore[misc]
