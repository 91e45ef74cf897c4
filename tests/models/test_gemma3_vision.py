"""Gemma 3 from 4B up: the language model is quantized, and the model still sees as it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rrsq
from rrsq.models.gemma3 import GEMMA3
from rrsq.quantizer.fold.rotations import rotate_model
from rrsq.quantizer.production.produce import OutputOptions, SourceModel, produce_checkpoint
from rrsq.recipe import Rotation
from rrsq.runtime.format.loading import load_tokenizer
from rrsq.runtime.modules.linear import QuantizedLinear
from rrsq.runtime.modules.rotation import RotatedLinear
from rrsq.runtime.rotation.rotations import make_rotations
from tiny_families import tiny_model
from tiny_quantized import recipe_of

PROCESSOR = '{"processor_class": "Gemma3Processor", "image_seq_length": 4}'


def seeing_model() -> Any:
    """The tiny model, with a projector that is not zero as a new one is."""
    model = tiny_model("gemma3")
    projector = model.model.multi_modal_projector.mm_input_projection_weight
    with torch.no_grad():
        projector.copy_(torch.randn(projector.shape, generator=torch.Generator().manual_seed(2)))
    return model


@pytest.fixture(scope="module")
def source(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "gemma3"
    seeing_model().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(PROCESSOR)
    return folder


def quantized(source: Path, out: Path, recipe: str, settings: list[str]) -> Any:
    produce_checkpoint(
        SourceModel(str(source), load_tokenizer(str(source))),
        recipe_of(recipe, settings),
        OutputOptions(out),
        None,
    )
    return rrsq.load(str(out), device="cpu")


def seen(model: Any, seed: int = 0) -> Tensor:
    """Logits of a text with one image of four tokens in it."""
    generator = torch.Generator().manual_seed(seed)
    image = model.config.image_token_id
    tokens = torch.tensor([[5, 7, image, image, image, image, 9, 11]])
    with torch.no_grad():
        return model(
            input_ids=tokens,
            token_type_ids=(tokens == image).long(),
            pixel_values=torch.randn(1, 3, 28, 28, generator=generator),
            use_cache=False,
        ).logits


def test_the_vision_tower_is_as_it_was(source: Path, tmp_path: Path) -> None:
    model = quantized(source, tmp_path / "out", "rtn-w4a4", [])
    original = seeing_model().state_dict()
    kept = {name: t for name, t in model.state_dict().items() if "language_model" not in name}
    assert any("vision_tower" in name for name in kept)
    assert any("multi_modal_projector" in name for name in kept)
    assert all(torch.equal(tensor, original[name]) for name, tensor in kept.items())
    assert isinstance(model.model.language_model.layers[0].mlp.up_proj, QuantizedLinear)


def test_images_are_seen_through_a_rotated_model() -> None:
    model, original = seeing_model(), seeing_model()
    sizes = GEMMA3.sizes(model.config)
    rotate_model(model, GEMMA3, make_rotations(Rotation(), sizes, 0, folds_residual=False), sizes)
    assert isinstance(model.model.language_model.layers[0].self_attn.q_proj, RotatedLinear)
    expected = seen(original)
    assert float((seen(model) - expected).norm() / expected.norm()) < 1e-5
    assert float((seen(original, seed=1) - expected).norm() / expected.norm()) > 1e-2


def test_a_4_bit_cache_holds_what_was_seen(source: Path, tmp_path: Path) -> None:
    """What an image left in the cache decides how the text goes on."""
    model = quantized(source, tmp_path / "out", "w16a16kv4", ["kv_cache.keys={group_size: 32}"])
    image = model.config.image_token_id
    tokens = torch.tensor([[5, 7, image, image, image, image, 9, 11]])
    last = []
    for seed in range(2):
        generated = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            token_type_ids=(tokens == image).long(),
            pixel_values=torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(seed)),
            min_new_tokens=4,
            max_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert generated.sequences.shape == (1, 12)
        last.append(generated.logits[-1])
    assert float((last[0] - last[1]).norm() / last[0].norm()) > 1e-3


def test_what_prepares_images_is_copied(source: Path, tmp_path: Path) -> None:
    quantized(source, tmp_path / "out", "rtn-w4a4", [])
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == PROCESSOR
    assert not (tmp_path / "out" / "processor_config.json").exists()
