"""The model that is to be quantized: an empty one, and its weights, read when they are asked for.

transformers renames the tensors of some checkpoints and merges others (the experts of a mixture) as it loads
them. Its own table says how; it is applied to the tensors of one module at a time.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...errors import CheckpointError
from ...models import family_for
from ...runtime.format.loading import load_config, load_model, locate_model
from ...runtime.format.shards import (
    DTYPES,
    SINGLE_SHARD,
    TensorPlace,
    has_shards,
    merge_headers,
    shard_files,
)
from ..calibration.fingerprint import (
    ModelFingerprint,
    config_fingerprint,
    model_fingerprint,
    weights_fingerprint,
)
from ..checks import check_finite, check_finite_weight
from ..memory import weight_bytes

__all__ = ["NoteCallback", "OpenedModel", "Weights", "empty_model", "open_model"]

NoteCallback = Callable[[str], None]
"""Called with a sentence that a user may want to read."""


class NotByLayerError(Exception):
    """The weights cannot be read module by module; the message says why, for a note to the user."""


class Weights(Protocol):
    """The original weights of a model; ``bytes`` is their size in the dtype they are read in."""

    bytes: int

    def fill(self, path: str, module: nn.Module) -> None:
        """Give a module its weights."""


@dataclass(frozen=True)
class OpenedModel:
    """A model to be quantized.

    Attributes:
        model: of transformers; on the meta device if ``weights`` has them in shards.
        weights: of it, finite.
        dtype: of its weights.
        fingerprint: of configuration and weights.
        folder: where its files are; None where it was loaded as a whole.
    """

    model: Any
    weights: Weights
    dtype: torch.dtype
    fingerprint: ModelFingerprint
    folder: Path | None = None


def open_model(
    model: str, data_root: Path | None = None, on_note: NoteCallback = lambda text: None
) -> OpenedModel:
    """Open a model, without its weights where they can be read one layer at a time.

    All weights are read once, to see that they are finite and to tell later whether they are still the same.

    Args:
        model: Hub id, Hugging Face folder or ``.gguf`` file.
        data_root: see :func:`locate_model`.
        on_note: told why a model is loaded as a whole.

    Raises:
        CheckpointError: a shard is damaged.
        ModelLoadError: the model cannot be found, reached or read.
        NonFiniteError: a weight holds NaN or Inf.
    """
    try:
        return _open_shards(model, data_root)
    except NotByLayerError as reason:
        on_note(f"The model is loaded as a whole, because {reason}.")
    loaded: Any = load_model(model, device="cpu", data_root=data_root)
    return OpenedModel(loaded, LoadedWeights(loaded), loaded.dtype, model_fingerprint(loaded))


def _open_shards(model: str, data_root: Path | None) -> OpenedModel:
    location, options = locate_model(model, data_root)
    if options:
        raise NotByLayerError("a GGUF file is converted as it is loaded")
    folder = _local_folder(location)
    if not has_shards(folder):
        raise NotByLayerError("it is not stored as safetensors")
    stored = merge_headers(shard_files(folder))
    config = load_config(model, data_root)
    dtype = _dtype(config, stored.values())
    empty = empty_model(config, dtype)
    source = ShardSource(stored, empty, dtype)
    _check_places(empty)
    fingerprint = ModelFingerprint(config_fingerprint(empty.config), source.check())
    return OpenedModel(empty, source, dtype, fingerprint, folder)


def _local_folder(location: str) -> Path:
    """The folder of a model; of one on the Hub, its configuration and the shards that its index names.

    Repositories may hold the same weights once more, in another format.
    """
    if Path(location).is_dir():
        return Path(location)
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(location, allow_patterns=["*.json"]))
        shards = [path.name for path in shard_files(folder)] if has_shards(folder) else [SINGLE_SHARD]
        return Path(snapshot_download(location, allow_patterns=["*.json", *shards]))
    except Exception as error:
        # transformers finds models in more ways than this, and says better what is wrong.
        raise NotByLayerError("its shards are not in a local folder") from error


def _dtype(config: Any, places: Iterable[TensorPlace]) -> torch.dtype:
    """That of the configuration, else that of the first floating tensor, as transformers chooses."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    dtypes = (DTYPES[place.dtype] for place in places if place.dtype in DTYPES)
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


def _check_places(model: Any) -> None:
    """All weights must be in modules that the pipeline opens."""
    family = family_for(model.config)
    places = (*family.places, *family.other_modules(model))
    for name in model.state_dict():
        if not any(name.startswith(f"{place}.") for place in places):
            raise NotByLayerError(f"'{name}' is outside of its layers")


def empty_model(config: Any, dtype: torch.dtype) -> Any:
    """A causal language model whose parameters are on the meta device; its buffers have their values."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from ...runtime.kv_cache.attention import cap_attention

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    cap_attention(model)
    return model.eval().requires_grad_(False)


class LoadedWeights:
    """Weights of a model that was loaded as a whole; checked when it is made."""

    def __init__(self, model: nn.Module) -> None:
        check_finite(model)
        self.bytes = weight_bytes(model)

    def fill(self, path: str, module: nn.Module) -> None:
        """Nothing: they are there."""


@dataclass
class _Origin:
    """How the tensors of a model that belong together come from stored ones."""

    converter: Any = None
    stored: list[tuple[str, str]] = field(default_factory=list)  # source pattern, name in the shards


class ShardSource:
    """The weights of a model in safetensors shards.

    Args:
        stored: the tensors of the shards, by name.
        model: of transformers, on the meta device; it says which tensors there are.
        dtype: what floating tensors are converted to.

    Raises:
        NotByLayerError: the names, dtypes or shapes of the tensors do not lead to those of the model.
    """

    def __init__(self, stored: Mapping[str, TensorPlace], model: Any, dtype: torch.dtype) -> None:
        self.model = model
        self.dtype = dtype
        self.stored = stored
        for name, place in stored.items():
            if place.dtype not in DTYPES:
                raise NotByLayerError(f"'{name}' is of dtype {place.dtype}")
        self.expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.origins = self._plan()
        # Tied weights count once.
        own = {id(origin): name for name, origin in self.origins.items()}
        self.bytes = sum(math.prod(self.expected[name]) for name in own.values()) * dtype.itemsize

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

    def fill(self, path: str, module: nn.Module) -> None:
        """See :class:`Weights`; the tensors are on the CPU."""
        names = [name for name in self.expected if name.startswith(f"{path}.")]
        tensors = {name.removeprefix(f"{path}."): self._tensor(name) for name in names}
        module.load_state_dict(tensors, assign=True)

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

    def check(self) -> str:
        """Read all weights once.

        Returns:
            Their :func:`~rrsq.quantizer.calibration.fingerprint.weights_fingerprint`.

        Raises:
            NonFiniteError: a weight holds NaN or Inf.
        """
        # Tied weights are one parameter of a loaded model, and two of one on the meta device.
        tied = {
            name
            for name, kept in (getattr(self.model, "all_tied_weights_keys", None) or {}).items()
            if self.origins.get(name) is self.origins.get(kept)
        }
        names = [name for name, _ in self.model.named_parameters() if name not in tied]
        return weights_fingerprint({name: partial(self._checked, name) for name in names}, workers=2)

    def _checked(self, name: str) -> Tensor:
        tensor = self._tensor(name)
        check_finite_weight(tensor, name)
        return tensor


def _natural(name: str) -> list[tuple[bool, int | str]]:
    """An order in which expert 10 comes after expert 9."""
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in name.split(".")]
