"""Opening the model that is to be quantized: as an empty one with a source for its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models import family_for
from ...recipe import Recipe
from ...runtime.format.format import CheckpointInfo, RotationInfo
from ...runtime.format.integration import assemble_model
from ...runtime.format.loading import load_config, load_model, locate_model
from ...runtime.format.shards import SINGLE_SHARD, has_shards, shard_files
from ...runtime.rotation.rotations import make_rotations
from ...runtime.scheme import head_is_kept
from ..calibration.fingerprint import ModelFingerprint, config_fingerprint, model_fingerprint
from .streaming import LoadedWeights, StoredWeights, Weights
from .weight_source import NotByLayerError, ShardSource

__all__ = ["NoteCallback", "OpenedModel", "empty_model", "open_model", "planned_tensors"]

NoteCallback = Callable[[str], None]
"""Called with a sentence that a user may want to read."""


@dataclass(frozen=True)
class OpenedModel:
    """A model to be quantized.

    Attributes:
        model: of transformers; on the meta device if ``weights`` has them in shards.
        weights: where they are.
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
    files = shard_files(folder)
    config = load_config(model, data_root)
    source_dtype = _dtype(config, files)
    empty = empty_model(config, source_dtype)
    source = ShardSource(files, empty, source_dtype)
    _check_places(empty)
    fingerprint = ModelFingerprint(config_fingerprint(empty.config), source.check())
    return OpenedModel(empty, StoredWeights(source), source_dtype, fingerprint, folder)


def empty_model(config: Any, dtype: torch.dtype) -> Any:
    """A causal language model whose parameters are on the meta device; its buffers have their values."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    return model.eval().requires_grad_(False)


def planned_tensors(config: Any, dtype: torch.dtype, recipe: Recipe) -> dict[str, Tensor]:
    """The tensors that a quantized model will have, by name, on the meta device."""
    family = family_for(config)
    rotations = make_rotations(
        recipe.rotation, family.sizes(config), seed=0, folds_residual=family.folds_residual
    )
    config = copy.deepcopy(config)
    if rotations.residual is not None or not head_is_kept(recipe, family):
        config.tie_word_embeddings = False
    model = empty_model(config, dtype)
    described = RotationInfo.model_validate(rotations.describe())
    with torch.device("meta"):
        assemble_model(model, CheckpointInfo(recipe=recipe, rotation=described))
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


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


def _dtype(config: Any, files: list[Path]) -> torch.dtype:
    """That of the configuration, else that of the first floating tensor, as transformers chooses."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    from ...runtime.format.validate import read_header
    from .layout import DTYPE_NAMES

    dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items() if dtype.is_floating_point}
    for file in files:
        for entry in read_header(file).values():
            if entry.get("dtype") in dtypes:
                return dtypes[entry["dtype"]]
    return torch.float32


def _check_places(model: Any) -> None:
    """All weights must be in modules that the pipeline opens."""
    family = family_for(model.config)
    places = (*family.places, *family.other_modules(model))
    for name in model.state_dict():
        if not any(name.startswith(f"{place}.") for place in places):
            raise NotByLayerError(f"'{name}' is outside of its layers")
