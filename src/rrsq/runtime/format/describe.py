"""A checkpoint in words and numbers: for the model card and ``rrsq inspect``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ...models import LinearInput, ModelFamily, family_named
from ...recipe import INPUTS, Activations, Recipe, Weights
from ..scheme import is_kept, treatment
from .format import CheckpointInfo, PlanInfo
from .json_files import read_config
from .shards import read_shards

__all__ = [
    "LAYER_COLUMNS",
    "LinearBits",
    "checkpoint_contents",
    "checkpoint_linear_bits",
    "contents_of",
    "describe_activations",
    "describe_cache",
    "describe_calibration",
    "describe_embedding",
    "describe_exceptions",
    "describe_head",
    "describe_layers",
    "describe_rotation",
    "describe_weights",
    "linear_bits",
    "shares_head",
    "stored_bits",
]

# Weights that an entry of the tensors of a quantized linear stands for.
_WEIGHTS_PER_ENTRY = {"weight_packed": 2, "weight_scale": 0, "weight_multiplier": 0}
_ROTATIONS = {
    "more_intermediate": "intermediate of other MLPs ({})",
    "residual_online": "residual ({}), online at the inputs of attention and MLP, since norms behind them"
    " keep it from being folded",
}


def describe_weights(info: CheckpointInfo) -> str:
    """Bits, method and groups of the weights."""
    return _weights(info.recipe.weights)


def describe_activations(info: CheckpointInfo) -> str:
    """Bits and smoothing of the activations."""
    return _activations(info.recipe.activations)


def describe_embedding(info: CheckpointInfo) -> str:
    """Bits and groups of the embedding."""
    embedding = info.recipe.embedding
    if embedding.bits == 16:
        return "16 bits"
    groups = "one scale a row"
    if embedding.bits == 4 and embedding.group_size is not None:
        groups = f"groups of up to {embedding.group_size} with signed multipliers"
    if embedding.bits == 4 and embedding.blocks > 1:
        groups += f", rotated in blocks of up to {embedding.blocks}"
    return f"INT{embedding.bits}, {groups}"


def describe_head(info: CheckpointInfo, *, shared: bool = False) -> str:
    """Bits of the output head; ``shared``: it has the embedding's codes and none of its own."""
    if shared:
        return f"tied: INT{info.recipe.embedding.bits} weights of the embedding, 16-bit activations"
    bits = info.recipe.head.bits
    return "16 bits" if bits == 16 else f"INT{bits} weights, 16-bit activations"


def describe_exceptions(info: CheckpointInfo) -> str:
    """What is treated otherwise than the lines above say, by pattern; empty if nothing is."""
    patterns: dict[str, list[str]] = {}
    for override in info.recipe.overrides:
        changes = []
        if override.weights is not None:
            changes.append(f"weights {_weights(override.weights)}")
        if override.activations is not None:
            changes.append(f"activations {_activations(override.activations)}")
        patterns.setdefault(", ".join(changes), []).append(override.match)
    parts = [f"{', '.join(matches)}: {changed}" for changed, matches in patterns.items()]
    parts += [f"{pattern}: full precision" for pattern in info.recipe.modules_to_not_convert]
    return "; ".join(parts)


def describe_cache(info: CheckpointInfo) -> str:
    """Bits of cached keys and values."""
    cache = info.recipe.kv_cache
    if cache is None:
        return "16 bits"
    wide = [index for index, bits in enumerate(info.key_bits) if bits != cache.keys.bits]
    keys, values = cache.keys, cache.values
    text = (
        f"INT{keys.bits} keys ({keys.bits_per_entry:g} bits with scales),"
        f" INT{values.bits} values ({values.bits_per_entry:g})"
    )
    return f"{text}; 8-bit keys in layers {', '.join(map(str, wide))}" if wide else text


def describe_rotation(info: CheckpointInfo) -> str:
    """The rotations and their sizes."""
    parts = [
        _ROTATIONS.get(name, f"{name.replace('_', ' ')} ({{}})").format(_plans(plans))
        for name, plans in info.rotation
        if plans is not None
    ]
    return "; ".join(parts) or "none"


def _plans(plans: PlanInfo | tuple[PlanInfo, ...] | int) -> str:
    if isinstance(plans, int):
        return f"every input, {plans} channels each"
    return " and ".join(
        str(plan.size) if plan.block == plan.size else f"{plan.size}, blocks of {plan.block}"
        for plan in (plans if isinstance(plans, tuple) else (plans,))
    )


def describe_calibration(info: CheckpointInfo) -> str:
    """The calibration text."""
    calibration = info.calibration
    if calibration is None:
        return "none needed"
    text = (
        f"{calibration.num_samples} windows of {calibration.sequence_length} tokens of {calibration.source}"
    )
    if calibration.bos_each_window:
        text += ", each behind BOS"
    return f"{text}, statistics of the full-precision model" if calibration.stored else text


def describe_layers(info: CheckpointInfo) -> tuple[list[str], list[list[str]]]:
    """What was measured of each layer, as the headings and the rows of a table.

    Columns of which no layer has a number are left out; :data:`LAYER_COLUMNS` explains them.
    """
    count = max(map(len, (info.layer_snr_db, info.weight_snr_db, info.cache_error, info.key_bits)))
    found = dict.fromkeys(name for layer in info.weight_snr_db for name in layer)
    # In the order a layer runs them; a configuration is written with its keys in the order of the alphabet.
    order: dict[str, int] = {name: place for place, name in enumerate(INPUTS)}
    names = sorted(found, key=lambda name: order.get(name.rsplit(".", 1)[-1], len(order)))
    last = [name.rsplit(".", 1)[-1] for name in names]
    titles = last if len(set(last)) == len(last) else names
    columns: list[tuple[str, list[str]]] = [
        ("layer", [str(index) for index in range(count)]),
        ("output SNR (dB)", [_number(value, ".1f") for value in info.layer_snr_db]),
        *(
            (f"{title} weights (dB)", [_number(snr.get(name), ".1f") for snr in info.weight_snr_db])
            for name, title in zip(names, titles, strict=True)
        ),
        ("cache error", [_number(value, ".2%") for value in info.cache_error]),
        ("key bits", [str(bits) for bits in info.key_bits]),
    ]
    shown = [(heading, cells) for heading, cells in columns if any(cells)]
    rows = [[cells[index] if index < len(cells) else "" for _, cells in shown] for index in range(count)]
    return [heading for heading, _ in shown], rows


LAYER_COLUMNS = (
    "Output SNR: signal over error of the layer's output on calibration text, against full precision on the"
    " same inputs. Weights: the same of one input's linears when only the weights are quantized. Cache error:"
    " relative error of the attention's output that the quantized cache alone causes."
)


def checkpoint_contents(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Sum the tensors of a checkpoint by kind.

    Args:
        folder: with safetensors shards.

    Returns:
        By kind (``INT4 linears``, ``embedding``, ``output head``, ``other``): tensors, bytes, and weights
        they stand for. There is no ``output head`` where it is tied to the embedding.

    Raises:
        CheckpointError: there is no shard, or one is damaged.
    """
    places = read_shards(folder).items()
    return contents_of((name, tuple(place.shape), place.size) for name, place in places)


def contents_of(tensors: Iterable[tuple[str, tuple[int, ...], int]]) -> dict[str, tuple[int, int, int]]:
    """The same of tensors given as names, shapes and bytes, there or planned."""
    found: dict[str, tuple[int, int, int]] = {}
    for name, shape, nbytes in tensors:
        kind = _kind(name)
        weights = math.prod(shape) * _WEIGHTS_PER_ENTRY.get(_leaf(name), 1)
        count, size, total = found.get(kind, (0, 0, 0))
        found[kind] = count + 1, size + nbytes, total + weights
    return dict(sorted(found.items()))


def shares_head(info: CheckpointInfo, contents: dict[str, tuple[int, int, int]]) -> bool:
    """Whether the output head has the embedding's codes, by what is stored."""
    return info.recipe.embedding.bits != 16 and "output head" not in contents


def stored_bits(contents: dict[str, tuple[int, int, int]]) -> str:
    """Bits per weight, scales and multipliers included: of quantized linears, and of all that is stored."""
    size, weights = (sum(entry[place] for entry in contents.values()) for place in (1, 2))
    whole = f"{8 * size / weights:.2f} of all stored"
    if "INT4 linears" not in contents:
        return whole
    _, size, weights = contents["INT4 linears"]
    return f"{8 * size / weights:.2f} of INT4 linears, {whole}"


@dataclass(frozen=True)
class LinearBits:
    """Means over linears, those in 16 bits included and those that a pattern keeps there left out.

    Attributes:
        weights: stored bits of a weight of the layers' linears and the output head.
        activations: bits of an activation of the layers' linears, weighted by the weights that it meets.
    """

    weights: float
    activations: float

    def __str__(self) -> str:
        return f"{self.weights:.2f} a weight, {self.activations:.2f} an activation"


def linear_bits(
    tensors: Iterable[tuple[str, tuple[int, ...], int]], recipe: Recipe, family: ModelFamily
) -> LinearBits | None:
    """What a budget of bits is counted in, of the tensors of a checkpoint.

    A tied head is stored as the embedding and counts like one of its own.

    Args:
        tensors: names, shapes and bytes, there or planned.
        recipe, family: of the checkpoint.

    Returns:
        None where every linear is kept by a pattern.
    """
    entries = {path: entry for entry in family.inputs for path in entry.linear_paths}
    paths = "|".join(map(re.escape, sorted(entries, key=len, reverse=True)))
    parts = r"(?:\.linear)?(?:\.(weight|weight_int8|weight_packed|weight_scale|weight_multiplier))?"
    in_layer = re.compile(rf"{re.escape(family.layers)}\.(\d+)\.({paths}){parts}")
    of_head = re.compile(rf"{re.escape(family.head)}{parts}")
    of_embedding = re.compile(rf"{re.escape(family.embedding)}{parts}")
    size = weights = products = met = 0
    head, embedding = (0, 0), (0, 0)
    for name, shape, nbytes in tensors:
        found, leaf = in_layer.fullmatch(name), _leaf(name)
        if leaf == "weight" and len(shape) < 2:  # A quantized linear's, which only tells of its dtype.
            continue
        count = math.prod(shape) * _WEIGHTS_PER_ENTRY.get(leaf, 1)
        if of_embedding.fullmatch(name):
            embedding = embedding[0] + count, embedding[1] + nbytes
        elif of_head.fullmatch(name):
            head = head[0] + count, head[1] + nbytes
        elif found is not None:
            layer, path = family.layer_name(int(found[1])), found[2]
            if not is_kept(recipe, f"{layer}.{path}"):
                size, weights = size + nbytes, weights + count
                met += count
                products += count * _input_bits(recipe, layer, entries[path])
    if not is_kept(recipe, family.head):
        count, nbytes = head if head[0] else embedding
        size, weights = size + nbytes, weights + count
    return LinearBits(8 * size / weights, products / met) if met else None


def checkpoint_linear_bits(folder: Path, recipe: Recipe) -> str:
    """:func:`linear_bits` of a checkpoint, in words.

    Raises:
        CheckpointError: there is no shard, or one is damaged.
        UnsupportedArchitectureError: no family is known for the model.
    """
    places = read_shards(folder).items()
    family = family_named(str(read_config(folder).get("model_type")))
    found = linear_bits(((name, tuple(place.shape), place.size) for name, place in places), recipe, family)
    return str(found or "none is quantized")


def _input_bits(recipe: Recipe, layer: str, entry: LinearInput) -> int:
    how = treatment(recipe, layer, entry)
    return how.activations.bits if how.linears else 16


def _kind(name: str) -> str:
    if "embed" in name:
        return "embedding"
    if "lm_head" in name:
        return "output head"
    return "INT4 linears" if _leaf(name) in _WEIGHTS_PER_ENTRY else "other"


def _leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _weights(weights: Weights) -> str:
    if weights.bits == 16:
        return "16 bits"
    groups = "one scale a row"
    if weights.group_size is not None:
        kind = "signed" if weights.signed else "integer"
        groups = f"groups of up to {weights.group_size} with {kind} multipliers"
    return f"INT{weights.bits}, {weights.method.upper()}, {groups}"


def _activations(activations: Activations) -> str:
    if activations.bits == 16:
        return "16 bits"
    smoothing = activations.smoothing
    if smoothing is None:
        return f"INT{activations.bits}, one scale a token"
    if activations.signed:
        return f"INT{activations.bits}, signed levels, groups of up to {smoothing.group_size} a token"
    scales = "integer multipliers" if smoothing.scales == "integer" else "real scales"
    return (
        f"INT{activations.bits}, runtime smoothing of {smoothing.scope} scope, groups of up to"
        f" {smoothing.group_size}, {scales}"
    )
