"""Checkpoints on more than one device, or off it: accelerate's dispatch of whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from transformers import AutoModelForCausalLM, DynamicCache

import rrsq
from rrsq.errors import UsageError
from rrsq.runtime.modules.linear import FusedLinears, PackedWeight
from tiny_quantized import logits_of, random_tokens

TOKENS = random_tokens(2, 12)
ON_DISK = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "disk"}
LAYERS_ON_DISK = {**ON_DISK, "model.layers.0": "cpu", "model.layers.1": "disk", "rotation_signs": "cpu"}


@pytest.fixture(scope="module")
def loaded(qwen2_checkpoint: Path) -> Any:
    return rrsq.load(str(qwen2_checkpoint), device="cpu")


def generated(model: Any) -> Any:
    return model.generate(TOKENS, max_new_tokens=6, min_new_tokens=6, do_sample=False)


def assert_works_like(model: Any, loaded: Any) -> None:
    for _ in range(3):  # What is kept between calls differs in the first ones.
        assert torch.equal(logits_of(model, TOKENS), logits_of(loaded, TOKENS))
    assert torch.equal(generated(model), generated(loaded))


def packed(model: Any) -> list[torch.Tensor]:
    return [tensor for name, tensor in model.named_buffers() if name.endswith("weight_packed")]


def test_offloaded_to_the_cpu(qwen2_checkpoint: Path, loaded: Any) -> None:
    model = rrsq.load(str(qwen2_checkpoint), device="cpu")
    cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    assert all(tensor.is_meta for tensor in packed(model))
    assert model.model.layers[0].self_attn.kv_quantizer.keys.offset.is_meta
    assert_works_like(model, loaded)
    assert all(tensor.is_meta for tensor in packed(model))


def test_dispatched_to_the_disk(qwen2_checkpoint: Path, loaded: Any, tmp_path: Path) -> None:
    model = rrsq.load(str(qwen2_checkpoint), device="cpu")
    dispatch_model(model, LAYERS_ON_DISK, offload_dir=str(tmp_path), offload_buffers=True)
    assert {tensor.device.type for tensor in packed(model)} == {"cpu", "meta"}
    assert_works_like(model, loaded)
    for module in model.model.layers[1].modules():  # Nothing of an offloaded weight is kept.
        if isinstance(module, PackedWeight):
            assert module._operand is None
            assert not module._prepared
        elif isinstance(module, FusedLinears):
            assert module._joined is None


@pytest.mark.parametrize("through", ["rrsq", "transformers"])
def test_loaded_with_layers_on_the_disk(
    qwen2_checkpoint: Path, loaded: Any, through: str, tmp_path: Path
) -> None:
    options = {"device_map": LAYERS_ON_DISK, "offload_folder": tmp_path}
    if through == "rrsq":
        model = rrsq.load(str(qwen2_checkpoint), **options)
        assert any(tensor.is_meta for tensor in packed(model))
    else:
        model = AutoModelForCausalLM.from_pretrained(qwen2_checkpoint, **options)
    assert_works_like(model, loaded)


def test_auto_has_one_device_here(qwen2_checkpoint: Path, loaded: Any) -> None:
    model = rrsq.load(str(qwen2_checkpoint), device_map="auto", max_memory={"cpu": "1GB"})
    assert_works_like(model, loaded)


def test_a_device_and_a_map_contradict(qwen2_checkpoint: Path) -> None:
    with pytest.raises(UsageError, match=r"device='cpu' and device_map"):
        rrsq.load(str(qwen2_checkpoint), device="cpu", device_map="auto")


def test_a_layer_stays_on_its_device(qwen2_checkpoint: Path) -> None:
    """Without a second device, the meta device shows that nothing of a layer is computed elsewhere."""
    model = rrsq.load(str(qwen2_checkpoint), device="cpu")
    first, second = "model.layers.0", "model.layers.1"
    places = {**dict.fromkeys(ON_DISK, "meta"), first: "cpu", second: "meta", "rotation_signs": "cpu"}
    places = {**places, "model.embed_tokens": "cpu", "model.rotary_emb": "cpu"}
    dispatch_model(model, places, main_device="cpu")
    cache = DynamicCache()
    for length in (12, 1):
        with torch.no_grad():
            model.model(TOKENS[:, :length], past_key_values=cache)
    for layer, device in zip(cache.layers, ("cpu", "meta"), strict=True):
        assert layer.get_seq_length() == 13
        assert {tensor.device.type for tensor in layer.stored.values()} == {device}
