"""Mutations of ``config.json`` and of the ``quantization_config`` in it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from hostile.case import Case, change_json, outcomes

__all__ = ["broken_json", "config_cases"]

CONFIG = "config.json"
OWN = outcomes(auto="own")
HUGE = 10**30


def config_cases() -> Iterator[Case]:
    """All of them."""
    for name, mutate in broken_json(CONFIG).items():
        yield Case("config-file", name, mutate, expected=OWN)
    yield from _sizes()
    yield from _fields()
    yield from _quantization_fields()
    yield from _rotations()


def broken_json(file: str) -> dict[str, Callable[[Path], Any]]:
    """A JSON file that is none, or no file at all."""

    def write(content: bytes) -> Callable[[Path], Any]:
        return lambda folder: (folder / file).write_bytes(content)

    def edit(change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
        return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes()))

    def replace_by(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
        def mutate(folder: Path) -> None:
            (folder / file).unlink()
            make(folder / file)

        return mutate

    return {
        "empty": write(b""),
        "blank": write(b" \n"),
        "list": write(b"[]"),
        "null": write(b"null"),
        "text": write(b'"text"'),
        "cut": edit(lambda text: text[: len(text) // 2]),
        "cut-at-the-end": edit(lambda text: text.rstrip()[:-1]),
        "deep-list": write(b"[" * 100000),
        "deep-object": write(b'{"a":' * 100000 + b"1" + b"}" * 100000),
        "no-utf8": edit(lambda text: text[:-10] + b"\xff\xfe" + text[-10:]),
        "utf16": edit(lambda text: text.decode().encode("utf-16")),
        "nul": edit(lambda text: text + b"\0"),
        "twice": edit(lambda text: text + text),
        "40-MB": write(b'{"a":"' + b"x" * 40_000_000 + b'"}'),
        "folder": replace_by(lambda path: path.mkdir()),
        "link-to-nowhere": replace_by(lambda path: path.symlink_to("nowhere.json")),
        "link-to-itself": replace_by(lambda path: path.symlink_to(path)),
        "device": replace_by(lambda path: path.symlink_to("/dev/zero")),
        "pipe": replace_by(os.mkfifo),
        "missing": replace_by(lambda path: None),
    }


def _set(key: str, value: Any) -> Callable[[Path], None]:
    return change_json(CONFIG, lambda config: config.__setitem__(key, value))


def _sizes() -> Iterator[Case]:
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "head_dim",
    )
    for name in names:
        for size in (10**9, 10**12, HUGE):
            yield Case("size", f"{name}-{size:.0e}", _set(name, size), expected=outcomes(auto="own"))
        for size in (0, -1, 7, 64.5, "64x", [64], {"a": 1}):
            # ``inspect`` compares no sizes, and shows the number of layers.
            yield Case(
                "size", f"{name}-{size}", _set(name, size), expected=outcomes(auto="own", inspect="shown")
            )

    def without_layer_types(layers: int) -> Callable[[Path], None]:
        def change(config: dict[str, Any]) -> None:
            config.pop("layer_types", None)
            config["num_hidden_layers"] = layers

        return change_json(CONFIG, change)

    for layers in (1, 3, 5000, 10**9):
        # transformers makes a list as long as the layers are many before it asks anybody.
        auto = "skipped" if layers > 10**8 else "error"
        expected = outcomes(auto=auto, inspect="shown" if layers < 100 else "error")
        yield Case("layers", str(layers), without_layer_types(layers), expected=expected)


def _fields() -> Iterator[Case]:
    refused: dict[str, list[Any]] = {
        "rms_norm_eps": ["x", float("nan"), float("inf"), None],
        "rope_parameters": [5, {"rope_type": "nonsense"}, {"rope_theta": "x"}, {"rope_theta": float("nan")}],
        "hidden_act": ["nonsense", 5, None, "../../act"],
        "model_type": ["nonsense", 5, None, "gpt2", "../llama", "bert"],
        "layer_types": [["full_attention"] * 5, ["evil", "evil"], 5, "full_attention"],
        "dtype": ["float8_e4m3fn", "load", "int8", 5],
    }
    for key, values in refused.items():
        for value in values:
            expected = outcomes(auto="own", inspect="shown")
            yield Case("field", f"{key}-{value}", _set(key, value), expected=expected)
    for value in ("evil/kernel", "kernels-community/flash-attn2", {"": "evil/kernel"}):
        for key in ("attn_implementation", "_attn_implementation", "experts_implementation"):
            yield Case("code-from-the-hub", f"{key}-{value}", _set(key, value))
    for value in ("../x.safetensors", "adapter_model.bin", "pytorch_model.bin", "/etc/passwd", 5):
        expected = outcomes(inspect="either")
        yield Case("other-weights", str(value), _set("transformers_weights", value), expected=expected)
    harmless = {
        "architectures": ["Evil"],
        "auto_map": {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"},
        "transformers_version": "99.0",
        "_name_or_path": "/etc/passwd",
        "unknown_field": {"a": [1, 2, {"b": None}]},
        "torch_dtype": None,
    }
    for key, value in harmless.items():
        yield Case("field-harmless", key, _set(key, value), expected=outcomes("same"))
    for key, value in (
        ("tie_word_embeddings", True),
        ("per_layer_config", 5),
        ("max_position_embeddings", HUGE),
    ):
        yield Case(
            "field",
            f"{key}-{value}",
            _set(key, value),
            expected=outcomes("either", auto="own", inspect="same"),
        )


# Fields whose value matters to nobody who loads a checkpoint, or is not checked then.
FIELDS = (
    "format_version",
    "key_bits",
    "rotation.residual.size",
    "rotation.head.block",
    "rotation.intermediate",
    "recipe",
    "recipe.name",
    "recipe.rotation.residual",
    "recipe.rotation.shards",
    "recipe.weights",
    "recipe.weights.bits",
    "recipe.weights.method",
    "recipe.weights.group_size",
    "recipe.weights.damping",
    "recipe.activations.bits",
    "recipe.activations.clip",
    "recipe.activations.smoothing",
    "recipe.activations.smoothing.scope",
    "recipe.activations.smoothing.inputs",
    "recipe.kv_cache.keys",
    "recipe.kv_cache.keys.bits",
    "recipe.kv_cache.values.zero_point",
    "recipe.kv_cache.keys.offset",
    "recipe.head.bits",
    "recipe.modules_to_not_convert",
    "recipe.overrides",
    "calibration.num_samples",
    "versions",
    "layer_snr_db",
)


def _at(config: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    *parents, leaf = f"quantization_config.{path}".split(".")
    for parent in parents:
        config = config[parent]
    return config, leaf


def _quantization_fields() -> Iterator[Case]:
    def put(path: str, value: Any) -> Callable[[Path], None]:
        def change(config: dict[str, Any]) -> None:
            section, leaf = _at(config, path)
            section[leaf] = value

        return change_json(CONFIG, change)

    # Of these, one or the other is what a field may hold.
    valid = {("recipe.name", "x"), ("key_bits", "[]")}
    for path in FIELDS:
        for value in ("x", -1, HUGE, [[1]], {"a": 1}):
            if (path, str(value)) in valid:
                continue
            expected = outcomes("either", inspect="shown")
            base: Literal["one", "first"] = "first" if path.startswith("rotation.") else "one"
            change = put(path, value)
            yield Case("quantization-field", f"{path}={value}", change, base=base, expected=expected)
    for version in (0, 3, HUGE, "1", None, [1], 1.5):
        yield Case("version", str(version), put("format_version", version))
    for path in (
        "mystery",
        "recipe.mystery",
        "rotation.mystery",
        "recipe.kv_cache.keys.mystery",
        "recipe.head.x",
    ):
        yield Case("unknown-field", path, put(path, 1))
    for method in ("rrsq2", "RRSQ", None, 5, ""):
        yield Case("method", str(method), put("quant_method", method), expected=outcomes(auto="own"))
    for section in (None, [], 5, "rrsq", {}, {"quant_method": "rrsq"}, [["rrsq"]]):
        expected = outcomes(auto="own")
        yield Case("section", json.dumps(section), _set("quantization_config", section), expected=expected)
    for pattern in ("*a" * 60 + "b", "[" * 1000, "*" * 100000):
        yield Case(
            "pattern",
            pattern[:4],
            put("recipe.modules_to_not_convert", [pattern]),
            expected=outcomes("either", inspect="shown"),
        )
    for text in ("[/red]", "[bold]", "\x1b[2J\x1b]0;owned\x07", "a\nb" * 100, "\ud800"):
        expected = outcomes("same", inspect="shown")
        yield Case("terminal", repr(text[:8]), put("source_model", text), expected=expected)


def _rotations() -> Iterator[Case]:
    def put(name: str, plan: Any) -> Callable[[Path], None]:
        return change_json(
            CONFIG, lambda config: config["quantization_config"]["rotation"].__setitem__(name, plan)
        )

    plans: dict[str, Any] = {
        "giant": {"size": 10**12, "block": 10**12, "base": 1},
        "giant-base": {"size": 10**18 + 12, "block": 10**18 + 12, "base": 10**18 + 12},
        "2^24": {"size": 2**24, "block": 2**24, "base": 1},
        "no-such-order": {"size": 92, "block": 23, "base": 23},
        "base-over-block": {"size": 64, "block": 32, "base": 64},
        "block-over-size": {"size": 64, "block": 128, "base": 1},
        "no-power-of-two": {"size": 96, "block": 48, "base": 4},
        "zero": {"size": 0, "block": 0, "base": 0},
        "another": {"size": 32, "block": 32, "base": 1},
        "list": [64, 64, 1],
        "text": "64",
    }
    for name in ("residual", "head", "across_heads", "intermediate", "more_intermediate", "residual_online"):
        for which, plan in plans.items():
            value = [plan] if name == "more_intermediate" and isinstance(plan, dict) else plan
            # ``inspect`` refuses what is no plan, and compares no sizes.
            expected = outcomes(inspect="shown" if which in ("2^24", "another") else "error")
            yield Case("rotation", f"{name}-{which}", put(name, value), base="first", expected=expected)
    for name in ("residual", "head", "across_heads", "intermediate"):
        expected = outcomes(inspect="shown")
        yield Case("rotation", f"{name}-left-out", put(name, None), base="first", expected=expected)
    # Blocks, which the default recipe has, and nothing else has.
    for blocks in (None, 8, 64, 0, 3, "16", 16.5, True, [16]):
        # JSON's true is taken for 1, which this checkpoint has not.
        expected = outcomes(inspect="shown" if blocks in (None, 8, 64, True) else "error")
        yield Case("rotation", f"blocks-{blocks!r}", put("blocks", blocks), expected=expected)
