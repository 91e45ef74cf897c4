"""Quantizing the tiny models of conftest.py, as several test files need it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from rrsq.quantizer.pipeline import QuantizedModel
    from rrsq.recipe import Recipe
    from rrsq.runtime.format.format import CheckpointInfo

VOCABULARY_SIZE = 512  # That of conftest.py's tokenizer and models.
WINDOWS = 6
WINDOW_LENGTH = 64


def load_tiny(folder: Path, dtype: str = "float32") -> Any:
    """The full-precision model of a folder, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    """Token ids of the tiny vocabulary, the special tokens left out."""
    import torch

    return torch.randint(2, VOCABULARY_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def recipe_of(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """A named recipe with overrides."""
    from rrsq.recipe import load_recipe

    return load_recipe(name, overrides)


def quantize_tiny(
    folder: Path,
    recipe: Recipe,
    *,
    seed: int = 0,
    dtype: str = "float32",
    windows: Tensor | None = None,
    **options: Any,
) -> QuantizedModel:
    """Quantize a tiny model on a few windows of random tokens."""
    from rrsq.quantizer.options import QuantizationOptions
    from rrsq.quantizer.pipeline import needs_calibration, quantize_model

    if windows is None and needs_calibration(recipe):
        windows = random_tokens(WINDOWS, WINDOW_LENGTH, seed=1)
    return quantize_model(load_tiny(folder, dtype), recipe, windows, QuantizationOptions(seed, **options))


def save_tiny(quantized: QuantizedModel, source: Path, out: Path, max_shard_size: str = "5GB") -> Path:
    """Write a checkpoint of a quantized tiny model with the tokenizer of ``source``."""
    from rrsq.quantizer.production.writer import checkpoint_info
    from rrsq.runtime.format.format import CalibrationInfo
    from rrsq.runtime.format.loading import load_tokenizer

    calibration = CalibrationInfo(
        source="random tokens", num_samples=WINDOWS, sequence_length=WINDOW_LENGTH, fingerprint="0" * 64
    )
    info = checkpoint_info(quantized, seed=0, source_model=source.name, calibration=calibration)
    return save_quantized(quantized, load_tokenizer(str(source)), info, out, max_shard_size)


def save_quantized(
    quantized: QuantizedModel, tokenizer: Any, info: CheckpointInfo, out: Path, max_shard_size: str = "5GB"
) -> Path:
    """Write a model that was quantized in memory, by what ``rrsq quantize`` writes layer by layer."""
    from rrsq.quantizer.production.output_shards import OutputShards, parse_size
    from rrsq.quantizer.production.writer import write_beside

    model: Any = quantized.model
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    out.mkdir()
    shards = OutputShards(out, tensors, parse_size(max_shard_size))
    shards.create()
    shards.write(tensors)
    write_beside(quantized, tokenizer, info, shards)
    return out


def logits_of(model: Any, tokens: Tensor, **kwargs: Any) -> Tensor:
    """Logits ``[batch, tokens, vocabulary]`` without gradients."""
    import torch

    with torch.inference_mode():
        return model(tokens, **kwargs).logits
