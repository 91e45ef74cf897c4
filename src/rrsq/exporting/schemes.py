"""What compressed-tensors is told of a model's linears: schemes, and the ``quantization_config`` of them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["LinearScheme", "quantization_config"]

PACKED, INTEGER, MIXED = "pack-quantized", "int-quantized", "mixed-precision"


@dataclass(frozen=True)
class LinearScheme:
    """How compressed-tensors stores the weight of a linear, and what is done to its input.

    Attributes:
        bits: of a weight, 4 or 8.
        group_size: channels that share a scale; None for one scale a row.
        zero_points: each group has one, beside its scale.
        int8_input: the input becomes int8 at run time, with one scale a token, and the weight is stored as
            int8; else the input stays in floating point, and the weight is packed into int32.
    """

    bits: int
    group_size: int | None = None
    zero_points: bool = False
    int8_input: bool = False

    @property
    def format(self) -> str:
        """compressed-tensors' name of how it is stored."""
        return INTEGER if self.int8_input else PACKED

    def config_group(self, targets: list[str]) -> dict[str, Any]:
        """The entry of ``config_groups`` for these targets."""
        return {
            "targets": targets,
            "weights": _arguments(
                self.bits,
                "channel" if self.group_size is None else "group",
                self.group_size,
                symmetric=not self.zero_points,
                dynamic=False,
            ),
            "input_activations": _arguments(8, "token", None, symmetric=True, dynamic=True)
            if self.int8_input
            else None,
            "output_activations": None,
        }

    def describe(self) -> str:
        """In words."""
        scales = "one scale a row" if self.group_size is None else f"a scale for {self.group_size} channels"
        zeros = " and a zero point" if self.zero_points else ""
        inputs = "int8 inputs, one scale a token" if self.int8_input else "16-bit inputs"
        return f"INT{self.bits} weights, {scales}{zeros}, {inputs}"


def _arguments(
    bits: int, strategy: str, group_size: int | None, *, symmetric: bool, dynamic: bool
) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group_size,
        "dynamic": dynamic,
    }


def quantization_config(
    schemes: Mapping[str, LinearScheme], kept: tuple[str, ...], layers: str
) -> dict[str, Any]:
    """What ``config.json`` says of an exported model.

    Args:
        schemes: of the quantized linears, by module path.
        kept: paths of the linears in full precision, the output head among them.
        layers: module path of the decoder layers.
    """
    by_scheme: dict[LinearScheme, list[str]] = defaultdict(list)
    in_layers = [path for path in schemes if _place(path, layers) is not None]
    # The head first: compressed-tensors warns of a name behind a class that fits as well.
    for path in (*(path for path in schemes if path not in in_layers), *in_layers):
        by_scheme[schemes[path]].append(path)
    alike = len({schemes[path] for path in in_layers}) == 1
    formats = {scheme.format for scheme in by_scheme}
    groups = {}
    for number, (scheme, paths) in enumerate(by_scheme.items()):
        groups[f"group_{number}"] = scheme.config_group(_targets(paths, in_layers, layers, alike=alike))
        if len(formats) > 1:
            groups[f"group_{number}"]["format"] = scheme.format
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(kept),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _targets(paths: list[str], in_layers: list[str], layers: str, *, alike: bool) -> list[str]:
    """Targets for the linears of one scheme.

    By their class, where those of all layers have it; else by a pattern for each linear that is the same in
    all layers, and by name. The head is always named: vLLM's is of no class that is a linear's.
    """
    mine = set(paths)
    elsewhere = {_place(path, layers) for path in in_layers if path not in mine}
    targets = []
    for path in paths:
        place = _place(path, layers)
        if place is None or place in elsewhere:
            targets.append(path)
        else:
            targets.append("Linear" if alike else rf"re:.*\.{re.escape(place)}$")
    return list(dict.fromkeys(targets))


def _place(path: str, layers: str) -> str | None:
    """Where in its layer a linear is, or None for one that is in no layer."""
    match = re.fullmatch(rf"{re.escape(layers)}\.\d+\.(.+)", path)
    return match[1] if match else None
