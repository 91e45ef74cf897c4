"""A loaded model that is cast and moved, in any order, is the model loaded in that dtype."""

from __future__ import annotations

import copy
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import rrsq
from rrsq.runtime.kv_cache.quantizer import CacheScheme, KVQuantizer
from tiny_quantized import logits_of, quantize_tiny, random_tokens, recipe_of, save_tiny

TOKENS = random_tokens(2, 12)
RECIPES = {
    "integer scales": ("rrs-w4a4kv4", ["kv_cache.values.offset=mean", "head.bits=8"]),
    "a tied embedding": ("rrs-w4a4kv4", ["embedding.bits=4"]),
    "real scales": ("rrs-paper-w4a4kv4", ["kv_cache.keys.offset=mean", "head.bits=4"]),
}
STEPS = {
    "half": lambda model: model.to(torch.float16),
    "cpu": lambda model: model.to("cpu"),
    "both": lambda model: model.to("cpu", torch.float16),
    "copy": copy.deepcopy,
    "run": lambda model: (answers(model), model)[1],
}


@pytest.fixture(scope="module", params=RECIPES.values(), ids=RECIPES)
def folder(
    request: Any, tiny_qwen2_dir: Path, tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    source = tiny_llama_dir if "embedding.bits=4" in request.param[1] else tiny_qwen2_dir
    quantized = quantize_tiny(source, recipe_of(*request.param))
    return save_tiny(quantized, source, tmp_path_factory.mktemp("casts") / "out")


def answers(model: Any) -> Tensor:
    """Logits of a prompt and of the token behind it, with a cache."""
    cache = DynamicCache()
    first = logits_of(model, TOKENS[:, :-1], past_key_values=cache)
    return torch.cat((first, logits_of(model, TOKENS[:, -1:], past_key_values=cache)), dim=1)


def test_in_any_order(folder: Path) -> None:
    expected = rrsq.load(str(folder), device="cpu", dtype="float16")
    expected.model.rotary_emb.half()  # As casting any model of transformers does.
    expected_answers, state = answers(expected), expected.state_dict()
    for steps in (("half",), ("both",), *permutations(("half", "cpu", "copy", "run"))):
        model = rrsq.load(str(folder), device="cpu", dtype="float32")
        for step in steps:
            model = STEPS[step](model)
        assert torch.equal(answers(model), expected_answers), steps
        for name, tensor in model.state_dict().items():
            assert tensor.dtype == state[name].dtype, (steps, name)
            assert torch.equal(tensor, state[name]), (steps, name)


def test_there_and_back(folder: Path) -> None:
    """What has to stay float32 is not rounded on the way; the rest is."""
    exact = rrsq.load(str(folder), device="cpu", dtype="float32").state_dict()
    model = rrsq.load(str(folder), device="cpu", dtype="float32").to(torch.float16).to(torch.float32)
    kept = 0
    for name, tensor in model.state_dict().items():
        stays = name.endswith("weight_scale") or "kv_quantizer" in name
        kept += stays
        expected = exact[name] if stays or not tensor.is_floating_point() else exact[name].half().float()
        assert torch.equal(tensor, expected), name
    assert kept > 10
    assert bool(torch.isfinite(answers(model)).all())


def test_offsets_follow_the_keys_and_values() -> None:
    """The meta device stands for a second one."""
    scheme = CacheScheme(4, 16, False, True, True)
    quantizer = KVQuantizer(scheme, scheme, 2, 16, None)
    states = torch.empty(1, 2, 3, 16, device="meta")
    stored = quantizer.encode(states, states, torch.zeros(1, 1, 3, 1, dtype=torch.int32, device="meta"))
    assert {tensor.device.type for tensor in stored.values()} == {"meta"}
    assert {tensor.device.type for tensor in quantizer.decode(stored, torch.float16)} == {"meta"}
