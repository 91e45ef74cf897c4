"""What to do to a model, as data.

A recipe is a frozen pydantic model; the named ones are YAML files in ``recipes/``. Unknown keys are refused
with the nearest valid one. ``--set activations.smoothing.group_size=32`` overrides one field by its path.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import RecipeError, did_you_mean

__all__ = [
    "INPUTS",
    "LARGEST",
    "Activations",
    "CacheTensor",
    "Embedding",
    "Head",
    "KVCache",
    "Override",
    "Recipe",
    "Rotation",
    "Smoothing",
    "Weights",
    "load_recipe",
    "override_recipe",
    "parse_recipe",
    "recipe_names",
]

_MAX_BYTES = 2**18
LARGEST = 2**31 - 1
"""No number of a recipe is larger: sizes of models are not, by far."""

Input = Literal["qkv", "o", "gate_up", "down"]
INPUTS: tuple[Input, ...] = get_args(Input)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Rotation(_Part):
    """Which orthogonal rotations are applied (names of SpinQuant, arXiv 2405.16406, and QuaRot)."""

    residual: bool = Field(default=True, description="R1: the residual stream, folded into weights")
    head: bool = Field(default=True, description="R2: head_dim of values, folded into v_proj and o_proj")
    across_heads: bool = Field(
        default=True, description="the head index of o_proj's input, online, where the order exists"
    )
    intermediate: bool = Field(default=True, description="R4: down_proj's input, online")
    blocks: int | None = Field(
        default=None,
        description="rotate every input online in blocks of so many neighbouring channels (1, 2, ... 64; at"
        " most what divides it), in place of residual, across_heads and intermediate",
    )
    balance: bool = Field(
        default=False, description="channels behind norms are balanced with the weights that read them"
    )
    shards: int = Field(
        default=1,
        ge=1,
        le=LARGEST,
        description="R4 and the rotation across heads stay within this many tensor-parallel shards",
    )

    @field_validator("blocks")
    @classmethod
    def _power_of_two(cls, blocks: int | None) -> int | None:
        if blocks is not None and blocks not in (1, 2, 4, 8, 16, 32, 64):
            raise ValueError("must be 1, 2, 4, 8, 16, 32 or 64")
        return blocks

    @model_validator(mode="after")
    def _in_blocks_or_whole(self) -> Rotation:
        if self.blocks is not None and (self.residual or self.across_heads or self.intermediate):
            raise ValueError("blocks needs residual: false, across_heads: false and intermediate: false")
        if self.balance and self.blocks is None:
            raise ValueError("balance needs blocks")
        return self


class Weights(_Part):
    """How weights become INT4 codes."""

    bits: Literal[4, 16] = Field(
        default=4, description="16 leaves the weights as they are: only the KV cache is quantized"
    )
    method: Literal["gptq", "rtn"] = Field(
        default="gptq", description="gptq: with error feedback, on calibration text; rtn: round to nearest"
    )
    group_size: int | None = Field(
        default=None,
        ge=2,
        le=LARGEST,
        description="channels an integer multiplier (1..15) covers; null: one scale a row",
    )
    signed: bool = Field(
        default=False,
        description="multipliers have a sign (±1..±15), so that the sixteenth code serves every group",
    )
    clip_search: bool = Field(default=True, description="search each scale for the least squared error")
    act_order: bool = Field(default=True, description="GPTQ visits channels by falling Hessian diagonal")
    damping: float = Field(
        default=0.01, gt=0, lt=1, description="fraction of the Hessian's mean diagonal added to it"
    )
    refinement: int = Field(
        default=0,
        ge=0,
        le=100,
        description="gptq: passes of descent on scales and codes behind it",
    )


class Smoothing(_Part):
    """Runtime smoothing (arXiv 2409.20361): groups of channels share a scale found at run time."""

    scope: Literal["token", "block", "sequence"] = Field(
        default="token", description="the tokens that share a scale"
    )
    statistic: Literal["max", "token_normalized_max"] = Field(
        default="max", description="a group's scale; the other divides each token by its RMS first"
    )
    group_size: int = Field(
        default=16,
        ge=1,
        le=LARGEST,
        description="channels that share a scale; the greatest common divisor fits it",
    )
    scales: Literal["integer", "real"] = Field(
        default="integer",
        description="integer: small multipliers inside the int8 operand; real: applied by the product",
    )
    channel_order: Literal["none", "calibrated", "per_call"] = Field(
        default="none",
        description="calibrated: stored, folded into weights; per_call: sorted in each call, simulated only",
    )
    inputs: tuple[Input, ...] = Field(default=INPUTS, description="which linear inputs are smoothed")

    @model_validator(mode="after")
    def _consistent(self) -> Smoothing:
        if self.scales == "integer" and self.scope != "token":
            raise ValueError("scales: integer needs scope: token, since each token has its own multipliers")
        if self.scales == "integer" and self.statistic != "max":
            raise ValueError("scales: integer needs statistic: max")
        if self.scales == "integer" and self.channel_order != "none":
            raise ValueError("scales: integer needs channel_order: none")
        return self


class Activations(_Part):
    """How the inputs of quantized linears become integers; 16 bits leaves them in floating point."""

    bits: Literal[4, 8, 16] = Field(default=4, description="16 leaves them in floating point")
    clip: float = Field(
        default=1.0, gt=0, le=1, description="fraction of the largest magnitude that the top code stands for"
    )
    signed: bool = Field(
        default=False,
        description="sixteen levels with a signed multiplier of least error a group; rotates in blocks in the"
        " same pass",
    )
    smoothing: Smoothing | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Activations:
        if self.signed and (self.bits == 16 or self.clip != 1):
            raise ValueError("signed needs bits of 4 or 8 and clip: 1")
        if self.signed and self.smoothing is not None and self.smoothing.scales != "integer":
            raise ValueError("signed needs smoothing.scales: integer")
        if self.smoothing is not None and self.bits == 16:
            raise ValueError("smoothing needs activations.bits of 4 or 8")
        if self.smoothing is not None and self.smoothing.scales == "integer" and self.bits != 4:
            raise ValueError("smoothing.scales: integer needs activations.bits: 4")
        return self


class CacheTensor(_Part):
    """How cached keys or values are stored."""

    bits: Literal[4, 8] = Field(default=4, description="of an entry")
    group_size: int = Field(
        default=128,
        ge=2,
        le=LARGEST,
        description="entries of head_dim that share a scale, at most head_dim",
    )
    zero_point: bool = Field(default=False, description="true: asymmetric, 16 levels from minimum to maximum")
    signed: bool = Field(
        default=False, description="scales have a sign, so that the lowest code serves every group"
    )
    rotate: bool = Field(default=True, description="Hadamard over head_dim before quantization (R3 for keys)")
    offset: Literal["none", "mean", "sink"] = Field(
        default="none",
        description="mean: the calibrated mean, for keys before RoPE, is taken off and put back; sink: and"
        " for keys at position 0, the attention sink, the mean of those there",
    )
    balance: bool = Field(
        default=False,
        description="keys: channels are balanced with those of the queries, in front of the rotation",
    )

    @model_validator(mode="after")
    def _consistent(self) -> CacheTensor:
        if self.signed and self.zero_point:
            raise ValueError("signed needs zero_point: false")
        return self

    @property
    def bits_per_entry(self) -> float:
        """Stored bits an entry costs, float16 scales and minima included, if a group fits into head_dim."""
        return self.bits + 16 * (2 if self.zero_point else 1) / self.group_size


class KVCache(_Part):
    """The quantized KV cache."""

    keys: CacheTensor = CacheTensor()
    values: CacheTensor = CacheTensor()
    sensitive_layers: int = Field(
        default=0, ge=0, le=LARGEST, description="this many layers, found in calibration, get 8-bit keys"
    )

    @model_validator(mode="after")
    def _of_keys(self) -> KVCache:
        if self.values.offset == "sink" or self.values.balance:
            raise ValueError("values have neither offset: sink nor balance: they are for keys")
        return self


class Embedding(_Part):
    """The embedding, whose rows are rounded to nearest; a tied head shares them where it can."""

    bits: Literal[16, 8, 4] = Field(
        default=16, description="8: one scale a row; 4: signed multipliers in groups of a row"
    )
    group_size: int | None = Field(
        default=32,
        ge=2,
        le=LARGEST,
        description="4 bits: channels a multiplier covers; null: one scale a row",
    )
    blocks: Literal[1, 2, 4, 8, 16, 32, 64] = Field(
        default=32,
        description="4 bits: rows are rotated in blocks of so many neighbouring channels (at most what"
        " divides them), and back as they are looked up",
    )


class Head(_Part):
    """The output head, which is quantized in its weights only."""

    bits: Literal[16, 8, 4] = Field(
        default=16,
        description="8: rounded to nearest, one scale a row; 4: as the weights section says; 16: as it is, or"
        " with a tied embedding's codes",
    )


class Override(_Part):
    """Other sections for some linear inputs; each given section replaces the recipe's as a whole."""

    match: str = Field(
        min_length=1, description="pattern of input names, such as *.mlp.down or model.layers.0.*"
    )
    weights: Weights | None = None
    activations: Activations | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Override:
        if self.weights is None and self.activations is None:
            raise ValueError("gives neither weights nor activations, so it overrides nothing")
        return self


class Recipe(_Part):
    """What decides a checkpoint's content, apart from the model, the calibration data and the seed."""

    name: str = Field(default="custom", description="stands in the checkpoint; a file's name if left out")
    description: str = Field(default="", description="one line for rrsq recipes")
    rotation: Rotation | None = Rotation()
    weights: Weights = Weights()
    activations: Activations = Activations()
    kv_cache: KVCache | None = None
    embedding: Embedding = Embedding()
    head: Head = Head()
    modules_to_not_convert: tuple[str, ...] = Field(
        default=(), description="patterns of module names that stay in full precision, such as *.o_proj"
    )
    overrides: tuple[Override, ...] = Field(
        default=(), description="other weights or activations for inputs by pattern; the last match counts"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.weights.bits == 16 and (self.activations.bits != 16 or self.rotation is not None):
            raise ValueError("weights.bits: 16 needs activations.bits: 16 and rotation: null")
        blocks = None if self.rotation is None else self.rotation.blocks
        for activations in (self.activations, *(o.activations for o in self.overrides if o.activations)):
            if activations.signed and blocks is None and self.rotation is not None:
                raise ValueError("activations.signed needs rotation.blocks, or rotation: null")
            scale_a_token = activations.smoothing is None and activations.clip == 1
            if blocks is not None and not (activations.bits == 16 or activations.signed or scale_a_token):
                raise ValueError("smoothing or clipping with rotation.blocks needs activations.signed")
        for override in self.overrides:
            weights, activations = override.weights or self.weights, override.activations or self.activations
            if weights.bits == 16 and activations.bits != 16:
                raise ValueError(
                    f"override of '{override.match}': weights.bits: 16 needs activations: {{bits: 16}} there"
                )
        return self

    @field_validator("name")
    @classmethod
    def _one_line(cls, name: str) -> str:
        if not name or len(name) > 100 or not name.isprintable():
            raise ValueError("must be one line of 1 to 100 printable characters")
        return name


def _folders() -> list[Path]:
    package = Path(__file__).resolve().parent
    return [package / "recipes", package.parent.parent / "recipes"]


def _named() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder in _folders():
        for path in sorted(folder.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return found


def recipe_names() -> list[str]:
    """The names that ``--recipe`` takes, sorted."""
    return sorted(_named())


def load_recipe(name_or_path: str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe by name or YAML path and apply ``key=value`` overrides.

    Args:
        name_or_path: a name in :func:`recipe_names`, or a path to a YAML file.
        overrides: assignments such as ``weights.group_size=64``; values are read as YAML.

    Raises:
        RecipeError: unknown name, unreadable file, unknown key or invalid value.
    """
    named = _named()
    path = named.get(name_or_path)
    if path is None:
        path = Path(name_or_path)
        try:
            found = path.is_file()
        except (OSError, ValueError):  # A name that no file can have.
            found = False
        if not found:
            raise RecipeError(
                f"No recipe '{name_or_path:.100}'.{did_you_mean(name_or_path, named)}"
                f" Known recipes: {', '.join(sorted(named))}; or give the path of a YAML file."
            )
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES} bytes")
        data = _parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"Recipe {path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"Recipe {path} must be a mapping of fields, as in the files of recipes/.")
    data.setdefault("name", path.stem)
    for override in overrides:
        _assign(data, override)
    return parse_recipe(data, str(path))


def override_recipe(recipe: Recipe, overrides: Iterable[str]) -> Recipe:
    """The recipe with ``key=value`` overrides, as :func:`load_recipe` takes them.

    Raises:
        RecipeError: unknown key or invalid value.
    """
    data = recipe.model_dump(mode="json")
    for override in overrides:
        _assign(data, override)
    return parse_recipe(data, recipe.name)


def parse_recipe(data: Any, source: str) -> Recipe:
    """Validate plain data as a recipe; ``source`` names it in the error."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"Recipe {source}: {_explain(error)}") from error


class _Loader(yaml.SafeLoader):
    """Without aliases: a recipe needs none, and a few lines of them make gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed in a recipe")
        return super().compose_node(parent, index)


def _parse_yaml(text: str) -> Any:
    """Plain data from YAML. Raises ValueError with the reason in one line."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except Exception as error:  # A number or a date that is none raises whatever Python raises for it.
        raise ValueError(" ".join(str(error).split())[:300]) from error


def _assign(data: dict[str, Any], assignment: str) -> None:
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set takes KEY=VALUE, for example weights.group_size=64; got '{assignment}'.")
    try:
        value = _parse_yaml(text)
    except ValueError as error:
        raise RecipeError(f"--set {assignment:.200}: the value is not valid YAML ({error}).") from error
    *parents, leaf = key.split(".")
    node = data
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise RecipeError(f"--set {assignment}: '{parent}' is a value, not a section.")
        node = child
    node[leaf] = value


def _fields_at(location: tuple[Any, ...]) -> list[str]:
    """The field names valid at a validation error's location."""
    model: type[BaseModel] = Recipe
    for key in location:
        field = model.model_fields.get(str(key))
        if field is None:
            break
        options = [field.annotation, *get_args(field.annotation)]
        nested = [t for t in options if isinstance(t, type) and issubclass(t, BaseModel)]
        if not nested:
            break
        model = nested[0]
    return list(model.model_fields)


def _explain(error: ValidationError) -> str:
    parts = []
    for problem in error.errors()[:5]:
        location = ".".join(str(key)[:100] for key in problem["loc"]) or "recipe"
        if problem["type"] == "extra_forbidden":
            valid = _fields_at(problem["loc"][:-1])
            hint = did_you_mean(str(problem["loc"][-1]), valid) or f" Valid keys: {', '.join(valid)}."
            parts.append(f"unknown key '{location}'.{hint}")
        else:
            parts.append(f"{location}: {problem['msg'].removeprefix('Value error, ')}.")
    return " ".join(parts)
