"""Reading the weights of a model's modules from its safetensors shards, when they are asked for.

transformers renames the tensors of some checkpoints and merges others (the experts of a mixture) as it loads
them. Its own table says how; it is applied to the tensors of one module at a time.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...runtime.format.validate import read_header
from ..calibration.fingerprint import weights_fingerprint
from ..checks import check_finite_weight
from .layout import DTYPE_NAMES
from .shard_files import raw_bytes

__all__ = ["NotByLayerError", "ShardSource"]

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class NotByLayerError(Exception):
    """The weights cannot be read module by module; the message says why, for a note to the user."""


@dataclass(frozen=True)
class _Stored:
    """A tensor of a shard: its first byte, counted from the file's start."""

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        tensor = torch.empty(self.shape, dtype=self.dtype)
        with self.file.open("rb") as file:
            file.seek(self.offset)
            file.readinto(raw_bytes(tensor))
        return tensor


@dataclass
class _Origin:
    """How the tensors of a model that belong together come from stored ones."""

    converter: Any = None
    stored: list[tuple[str, str]] = field(default_factory=list)  # source pattern, name in the shards


class ShardSource:
    """The weights of a model in safetensors shards.

    Args:
        files: the shards.
        model: of transformers, on the meta device; it says which tensors there are.
        dtype: what floating tensors are converted to.

    Raises:
        CheckpointError: a shard is missing or damaged.
        NotByLayerError: the names or shapes of the tensors do not lead to those of the model.
    """

    def __init__(self, files: list[Path], model: Any, dtype: torch.dtype) -> None:
        self.model = model
        self.dtype = dtype
        self.stored: dict[str, _Stored] = {}
        for path in files:
            start = 8 + int.from_bytes(path.open("rb").read(8), "little") if path.is_file() else 0
            for name, entry in read_header(path).items():
                if entry.get("dtype") not in _DTYPES:
                    raise NotByLayerError(f"'{name}' is of dtype {entry.get('dtype')}")
                first = start + entry["data_offsets"][0]
                shape = tuple(entry["shape"])
                self.stored[name] = _Stored(path, first, _DTYPES[entry["dtype"]], shape)
                size = entry["data_offsets"][1] - entry["data_offsets"][0]
                if math.prod(shape) * _DTYPES[entry["dtype"]].itemsize != size:
                    raise CheckpointError(f"{path} is damaged: '{name}' has not the size of its shape.")
        self.expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.origins = self._plan()

    def _plan(self) -> dict[str, _Origin]:
        """By the first tensor of the model that each makes."""
        try:
            origins = self._renamed()
        except (ImportError, AttributeError, TypeError) as error:
            raise NotByLayerError(f"this transformers converts checkpoints otherwise ({error})") from error
        tied = dict(getattr(self.model, "all_tied_weights_keys", None) or {})
        for target, source in tied.items():
            if target in self.expected and target not in origins and source in origins:
                origins[target] = origins[source]
        missing = sorted(self.expected.keys() - origins.keys())
        if missing:
            raise NotByLayerError(f"'{missing[0]}' is not in its shards")
        for name, origin in origins.items():
            if origin.converter is None and self.stored[origin.stored[0][1]].shape != self.expected[name]:
                raise NotByLayerError(f"'{name}' has another shape in its shards")
        return origins

    def _renamed(self) -> dict[str, _Origin]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        prefix, expected = self.model.base_model_prefix, self.model.state_dict()
        origins: dict[str, _Origin] = defaultdict(_Origin)
        for name in sorted(self.stored, key=_natural):
            target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
            if target not in expected and name in expected:
                target, pattern = name, None
            if target not in expected:
                continue
            if pattern is not None and len(by_pattern[pattern].target_patterns) > 1:
                raise NotByLayerError(f"'{name}' is split as it is loaded")
            origins[target].stored.append((pattern or name, name))
            if pattern is not None:
                origins[target].converter = by_pattern[pattern]
        return dict(origins)

    def read(self, path: str) -> dict[str, Tensor]:
        """The tensors of a module by their names in it, on the CPU."""
        names = [name for name in self.expected if name.startswith(f"{path}.")]
        return {name.removeprefix(f"{path}."): self._tensor(name) for name in names}

    def _tensor(self, name: str) -> Tensor:
        origin = self.origins[name]
        if origin.converter is None:
            tensor = self.stored[origin.stored[0][1]].read()
        else:
            converter = copy.deepcopy(origin.converter)
            for pattern, stored in origin.stored:
                converter.add_tensor(name, stored, pattern, self.stored[stored].read())
            made = converter.convert(name, model=self.model, config=self.model.config)[name]
            tensor = made[0] if isinstance(made, list) else made
        if tuple(tensor.shape) != self.expected[name]:
            raise CheckpointError(
                f"'{name}' has shape {list(tensor.shape)} in its shards; the model needs"
                f" {list(self.expected[name])}."
            )
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def bytes_of_model(self) -> int:
        """Bytes of all weights in the dtype they are read in, tied ones once."""
        own = {id(origin): name for name, origin in self.origins.items()}
        return sum(math.prod(self.expected[name]) for name in own.values()) * self.dtype.itemsize

    def check(self) -> str:
        """Read all weights once.

        Returns:
            Their :func:`~rrsq.quantizer.calibration.fingerprint.weights_fingerprint`.

        Raises:
            NonFiniteError: a weight holds NaN or Inf.
        """
        own = {name: partial(self._checked, name) for name, _ in self.model.named_parameters()}
        return weights_fingerprint(own, workers=2)

    def _checked(self, name: str) -> Tensor:
        tensor = self._tensor(name)
        check_finite_weight(tensor, name)
        return tensor


def _natural(name: str) -> list[tuple[bool, int | str]]:
    """An order in which expert 10 comes after expert 9."""
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in name.split(".")]
