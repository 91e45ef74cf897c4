"""What a quantization would give, from a model's configuration and a recipe: no weight is fetched or read.

Time is not forecast: GPTQ of one layer on random numbers says little of the text that is run through it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..models import family_for
from ..recipe import Recipe
from ..runtime.format.describe import LinearBits, contents_of, linear_bits
from ..runtime.format.format import CheckpointInfo, RotationInfo
from ..runtime.format.loading import load_config
from ..runtime.rotation.rotations import make_rotations
from ..runtime.scheme import treatment
from .needs import needs_calibration
from .production.output_shards import planned_tensors
from .production.produce import check_source
from .production.source import empty_model
from .projection import ProjectedMemory, projected_memory

__all__ = ["Forecast", "forecast"]


@dataclass(frozen=True)
class Forecast:
    """What is known before a quantization.

    Attributes:
        architecture: the model type and its number of layers.
        parameters: numbers in the model's weights; of tied ones once.
        dtype: of the weights, as the configuration says; bfloat16 where it does not.
        bytes_before, bytes_after: size of all weights.
        contents: of the checkpoint, as :func:`rrsq.runtime.format.describe.checkpoint_contents` gives them.
        info: the recipe and the rotations, as the checkpoint will say them.
        memory: at the peak of the quantization.
        kept: linears of the layers that stay in 16 bits, with the number of layers.
        linear_bits: what a budget of bits is counted in; None where every linear is kept by a pattern.
    """

    architecture: str
    parameters: int
    dtype: str
    bytes_before: int
    contents: dict[str, tuple[int, int, int]]
    info: CheckpointInfo
    memory: ProjectedMemory
    kept: dict[str, int]
    linear_bits: LinearBits | None

    @property
    def bytes_after(self) -> int:
        """Size of all weights of the checkpoint."""
        return sum(size for _, size, _ in self.contents.values())


def forecast(
    model: str,
    recipe: Recipe,
    *,
    num_samples: int,
    sequence_length: int,
    data_root: Path | None = None,
    offloaded: bool = False,
) -> Forecast:
    """Say what quantizing a model would give.

    Args:
        model: Hub id, Hugging Face folder or ``.gguf`` file.
        recipe: what would be done.
        num_samples, sequence_length: windows of calibration text, and tokens in one; 0 without text.
        data_root: folder laid out like the Hub, looked in before it.
        offloaded: the activations of calibration would be in a mapped file.

    Raises:
        UsageError: the model cannot be quantized, or not by this recipe; as :func:`check_source`.
    """
    family = check_source(model, data_root, recipe)
    config = load_config(model, data_root)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    empty = empty_model(config, dtype)
    text = config.get_text_config()
    tied = set(empty.all_tied_weights_keys) if config.tie_word_embeddings else set()
    weights = {name: value for name, value in empty.named_parameters() if name not in tied}
    rotations = make_rotations(
        recipe.rotation, family_for(config).sizes(config), seed=0, folds_residual=family.folds_residual
    )
    cache = recipe.kv_cache
    info = CheckpointInfo(
        recipe=recipe,
        rotation=RotationInfo.model_validate(rotations.describe()),
        key_bits=() if cache is None else (cache.keys.bits,) * text.num_hidden_layers,
        source_model=model,
    )
    samples, tokens = (num_samples, sequence_length) if needs_calibration(recipe) else (0, 0)
    planned = [
        (name, tuple(value.shape), value.nbytes)
        for name, value in planned_tensors(config, dtype, recipe).items()
    ]
    kept: dict[str, int] = {}
    for index, layer in enumerate(empty.get_submodule(family.layers).children()):
        for entry in family.inputs_in(layer):
            quantized = treatment(recipe, family.layer_name(index), entry).linears
            for name, path in zip(entry.linears, entry.linear_paths, strict=True):
                if name not in quantized:
                    kept[path] = kept.get(path, 0) + 1
    return Forecast(
        architecture=f"{config.model_type}, {text.num_hidden_layers} layers",
        parameters=sum(value.numel() for value in weights.values()),
        dtype=str(dtype).removeprefix("torch."),
        bytes_before=sum(value.nbytes for value in weights.values()),
        contents=contents_of(planned),
        info=info,
        memory=projected_memory(empty, recipe, samples, tokens, offloaded=offloaded),
        kept=kept,
        linear_bits=linear_bits(planned, recipe, family),
    )
