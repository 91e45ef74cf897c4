"""The linear shapes of known models, and of a model folder's ``config.json``."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from rrsq.errors import UsageError, did_you_mean

__all__ = ["MODELS", "LinearShape", "ModelSizes", "model_shapes", "parse_shape"]


@dataclass(frozen=True)
class LinearShape:
    """A linear ``[out_features, in_features]`` and the online rotation of its input (0: none)."""

    name: str
    out_features: int
    in_features: int
    rotated: bool = False

    def __str__(self) -> str:
        return f"{self.out_features}x{self.in_features}"


@dataclass(frozen=True)
class ModelSizes:
    """What of a model's configuration its linears' shapes follow from."""

    hidden_size: int
    intermediate_size: int
    query_size: int
    key_value_size: int

    def linears(self) -> list[LinearShape]:
        """The distinct products of a decoder layer: those that share an input are one."""
        return [
            LinearShape("qkv_proj", self.query_size + 2 * self.key_value_size, self.hidden_size),
            LinearShape("o_proj", self.hidden_size, self.query_size),
            LinearShape("gate_up_proj", 2 * self.intermediate_size, self.hidden_size),
            LinearShape("down_proj", self.hidden_size, self.intermediate_size, rotated=True),
        ]


MODELS = {
    "llama-3-8b": ModelSizes(4096, 14336, 4096, 1024),
    "llama-3-70b": ModelSizes(8192, 28672, 8192, 1024),
    "llama-2-7b": ModelSizes(4096, 11008, 4096, 4096),
    "mistral-7b": ModelSizes(4096, 14336, 4096, 1024),
    "qwen2.5-0.5b": ModelSizes(896, 4864, 896, 128),
    "qwen2.5-7b": ModelSizes(3584, 18944, 3584, 512),
}


def parse_shape(text: str) -> LinearShape:
    """Parse ``NxK`` (output by input channels); ``NxK:rotated`` adds an online rotation of the input.

    Raises:
        UsageError: the text is of another form, or K is no multiple of 32.
    """
    match = re.fullmatch(r"(\d+)[x×](\d+)(:rotated)?", text)
    if match is None:
        raise UsageError(f"--shape {text}: expected OUTxIN, for example 4096x14336 or 4096x14336:rotated.")
    out_features, in_features = int(match[1]), int(match[2])
    if not out_features or not in_features or in_features % 32:
        raise UsageError(f"--shape {text}: the input channels must be a multiple of 32.")
    return LinearShape(text, out_features, in_features, rotated=match[3] is not None)


def model_shapes(name: str) -> list[LinearShape]:
    """The linears of a named model (:data:`MODELS`) or of a folder that holds a ``config.json``.

    Raises:
        UsageError: neither such a name nor such a folder, or the configuration lacks a size.
    """
    if name in MODELS:
        return MODELS[name].linears()
    path = Path(name) / "config.json"
    if not path.is_file():
        known = ", ".join(MODELS)
        raise UsageError(
            f"--model {name}: neither a known name ({known}) nor a folder with a config.json."
            f"{did_you_mean(name, MODELS)}"
        )
    config = json.loads(path.read_text())
    try:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        head_dim = config.get("head_dim") or hidden // heads
        key_value_heads = config.get("num_key_value_heads") or heads
        sizes = ModelSizes(hidden, config["intermediate_size"], heads * head_dim, key_value_heads * head_dim)
    except KeyError as error:
        raise UsageError(
            f"{path} has no {error}: --model needs a decoder-only model's configuration."
        ) from error
    return sizes.linears()
