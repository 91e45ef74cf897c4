"""Every tensor of a checkpoint has one place in vLLM's model, and each parameter gets its tensors."""

from __future__ import annotations

import json
import math
import shutil
from typing import TYPE_CHECKING

import pytest
import torch
from fake_vllm import REASON, engine_config, has_vllm, serve, tensors_of
from servable import EXPERTS, SERVABLE, SIZES, llama
from transformers import GemmaConfig

from rrsq.errors import CheckpointError, UsageError
from rrsq.kernels import pack_int4, unpack_int4

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from conftest import Make

pytestmark = pytest.mark.skipif(not has_vllm(), reason=REASON)

DOWN = "model.layers.1.mlp.down_proj"
EXPERT = "model.layers.0.mlp.experts.down_proj"


@pytest.fixture(params=["dense", "experts"])
def checkpoint(request: pytest.FixtureRequest, make: Make) -> tuple[Path, str]:
    """A checkpoint, and one of its linears in 4 bits."""
    if request.param == "dense":
        return make("llama", llama()), DOWN
    return make("mixtral", EXPERTS["mixtral"]()), EXPERT


@pytest.mark.parametrize("kind", ["weight_packed", "weight_scale", "weight_multiplier"])
def test_a_missing_tensor(kind: str, checkpoint: tuple[Path, str]) -> None:
    folder, linear = checkpoint
    weights = dict(tensors_of(folder))
    del weights[f"{linear}.{kind}"]
    with pytest.raises(CheckpointError, match=rf"lacks the tensor '{linear}\.{kind}'\. A shard"):
        serve(folder, weights=weights)


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.bias"]
)
def test_a_missing_tensor_that_is_not_quantized(name: str, make: Make) -> None:
    folder = make("llama", llama(), ["head.bits=16"])
    weights = dict(tensors_of(folder))
    del weights[name]
    with pytest.raises(CheckpointError, match=f"lacks the tensor '{name}'"):
        serve(folder, weights=weights)


@pytest.mark.parametrize("kind", ["weight_packed", "weight_scale", "weight_multiplier"])
def test_a_missing_tensor_of_an_embedding(kind: str, make: Make) -> None:
    folder = make("gemma", SERVABLE["gemma"](), ["embedding.bits=4", "head.bits=16"])
    weights = dict(tensors_of(folder))
    assert not any(name.startswith("lm_head.") for name in weights)
    scale = weights["model.embed_tokens.weight_scale"].clone()
    removed = weights.pop(f"model.embed_tokens.{kind}")
    with pytest.raises(CheckpointError, match=rf"lacks the tensor 'model\.embed_tokens\.{kind}'"):
        serve(folder, weights=weights)
    weights[f"model.embed_tokens.{kind}"] = removed
    scale[3] = float("nan")
    with pytest.raises(CheckpointError, match="weight_scale"):
        serve(folder, weights={**weights, "model.embed_tokens.weight_scale": scale})


@pytest.mark.parametrize("path", ["model.embed_tokens", "lm_head"])
@pytest.mark.parametrize("kind", ["weight_int8", "weight_scale"])
def test_a_missing_tensor_of_8_bits(path: str, kind: str, make: Make) -> None:
    folder = make("llama", llama())
    weights = dict(tensors_of(folder))
    del weights[f"{path}.{kind}"]
    with pytest.raises(CheckpointError, match=rf"lacks the tensor '{path}\.{kind}'"):
        serve(folder, weights=weights)


def test_a_surplus_tensor(make: Make) -> None:
    folder = make("llama", llama())
    weights = {**dict(tensors_of(folder)), "model.layers.0.mlp.down_proj.zero": torch.zeros(3)}
    with pytest.raises(CheckpointError, match=r"down_proj\.zero', for which its config\.json"):
        serve(folder, weights=weights)


@pytest.mark.parametrize("kind", ["weight_packed", "weight_scale", "weight_multiplier"])
def test_a_misshapen_tensor(kind: str, checkpoint: tuple[Path, str]) -> None:
    folder, linear = checkpoint
    weights = dict(tensors_of(folder))
    tensor = weights[f"{linear}.{kind}"]
    weights[f"{linear}.{kind}"] = torch.cat([tensor, tensor])
    with pytest.raises(CheckpointError, match=rf"{linear}\.{kind}' of the checkpoint has shape"):
        serve(folder, weights=weights)


def test_another_dtype(make: Make) -> None:
    folder = make("llama", llama())
    weights = dict(tensors_of(folder))
    weights[f"{DOWN}.weight_multiplier"] = weights[f"{DOWN}.weight_multiplier"].float()
    with pytest.raises(CheckpointError, match=r"has dtype torch\.float32"):
        serve(folder, weights=weights)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [("weight_scale", math.nan, "scale that is not"), ("weight_multiplier", 16, "zero or beyond")],
)
def test_values_that_none_can_have(
    kind: str, value: float, message: str, checkpoint: tuple[Path, str]
) -> None:
    folder, linear = checkpoint
    weights = dict(tensors_of(folder))
    weights[f"{linear}.{kind}"].view(-1)[0] = value
    with pytest.raises(CheckpointError, match=message):
        serve(folder, weights=weights)


def test_a_feature_that_vllm_does_not_implement(make: Make) -> None:
    """vLLM's Gemma has no biases, and by itself passes over them."""
    config = GemmaConfig(**SIZES, head_dim=12, attention_bias=True)
    with pytest.raises(CheckpointError, match=r"self_attn\..*bias' cannot be loaded.*does not implement"):
        serve(make("gemma with biases", config))


def test_another_format_version(make: Make, tmp_path: Path) -> None:
    folder = shutil.copytree(make("llama", llama()), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 77
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="format version 77"):
        engine_config(folder)


def test_a_shard_that_was_not_copied(make: Make, tmp_path: Path) -> None:
    folder = shutil.copytree(make("llama", llama()), tmp_path / "out")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    files = {name: f"model-0000{1 + ('head' in name)}-of-00002.safetensors" for name, _ in tensors_of(folder)}
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lacks the file '.*model-00002-of-00002\.safetensors'"):
        engine_config(folder)


def test_experts_as_wholes_are_refused(make: Make) -> None:
    folder = make("mixtral", EXPERTS["mixtral"](), ["rotation.shards=2"])
    with pytest.raises(UsageError, match="--enable-expert-parallel"):
        serve(folder, 2, enable_expert_parallel=True)


def test_a_rotation_across_processes_is_refused(make: Make) -> None:
    with pytest.raises(UsageError, match=r"rotation\.shards=2"):
        serve(make("llama", llama(), recipe="rrs1-w4a4kv4"), 2)


def parts(tensor: Tensor, ranks: int, dim: int) -> list[Tensor]:
    return list(tensor.chunk(ranks, dim))


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_process_has_its_part(ranks: int, make: Make) -> None:
    """Against the checkpoint's codes: packed bytes of 96 / ranks channels are not runs of those of 96."""
    folder = make("llama", llama(), [f"rotation.shards={ranks}"])
    weights = dict(tensors_of(folder))
    served = serve(folder, ranks)
    codes = unpack_int4(weights[f"{DOWN}.weight_packed"])
    for rank, model in enumerate(served.models):
        layer = model.model.layers[1]
        own = parts(codes, ranks, 1)[rank].contiguous()
        assert torch.equal(layer.mlp.down_proj.weight_packed, pack_int4(own))
        assert torch.equal(layer.mlp.down_proj.weight_scale, weights[f"{DOWN}.weight_scale"])
        rows = [
            parts(weights[f"model.layers.1.mlp.{name}.weight_packed"], ranks, 0)[rank]
            for name in ("gate_proj", "up_proj")
        ]
        assert torch.equal(layer.mlp.gate_up_proj.weight_packed, torch.cat(rows))
        query = parts(weights["model.layers.1.self_attn.q_proj.weight_scale"], ranks, 0)[rank]
        key = parts(weights["model.layers.1.self_attn.k_proj.weight_scale"], 2, 0)[rank * 2 // ranks]
        scales = layer.self_attn.qkv_proj.weight_scale
        assert torch.equal(scales[: len(query)], query)
        assert torch.equal(scales[len(query) :][: len(key)], key)


def test_16_bit_experts_have_their_part(make: Make) -> None:
    folder = make(
        "mixtral", EXPERTS["mixtral"](), ["modules_to_not_convert=['*.experts.*']", "rotation=null"]
    )
    weights = dict(tensors_of(folder))
    name = "model.layers.0.mlp.experts"
    gate, up = weights[f"{name}.gate_up_proj.weight"].chunk(2, dim=1)
    for rank, model in enumerate(serve(folder, 2).models):
        experts = model.model.layers[0].block_sparse_moe.experts.routed_experts
        own = torch.cat([parts(gate, 2, 1)[rank], parts(up, 2, 1)[rank]], dim=1)
        assert torch.equal(experts.w13_weight, own)
        assert torch.equal(experts.w2_weight, parts(weights[f"{name}.down_proj.weight"], 2, 2)[rank])
