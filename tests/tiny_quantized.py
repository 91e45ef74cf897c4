"""Quantizing the tiny models of conftest.py, as several test files need it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from rrsq.quantizer.pipeline import QuantizedModel
    from rrsq.recipe import Recipe

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
    from rrsq.quantizer.pipeline import needs_calibration, quantize_model

    if windows is None and needs_calibration(recipe):
        windows = random_tokens(WINDOWS, WINDOW_LENGTH, seed=1)
    return quantize_model(load_tiny(folder, dtype), recipe, windows, seed=seed, **options)


def save_tiny(quantized: QuantizedModel, source: Path, out: Path, **options: Any) -> Path:
    """Write a checkpoint of a quantized tiny model with the tokenizer of ``source``."""
    from rrsq.quantizer.production.writer import checkpoint_info, write_checkpoint
    from rrsq.runtime.format.format import CalibrationInfo
    from rrsq.runtime.format.loading import load_tokenizer

    calibration = CalibrationInfo(
        source="random tokens", num_samples=WINDOWS, sequence_length=WINDOW_LENGTH, fingerprint="0" * 64
    )
    info = checkpoint_info(quantized, seed=0, source_model=source.name, calibration=calibration)
    write_checkpoint(quantized, load_tokenizer(str(source)), info, out, **options)
    return out


def logits_of(model: Any, tokens: Tensor, **kwargs: Any) -> Tensor:
    """Logits ``[batch, tokens, vocabulary]`` without gradients."""
    import torch

    with torch.inference_mode():
        return model(tokens, **kwargs).logits
