"""The files of a checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

import rrsq
from rrsq.quantizer.pipeline import QuantizedModel
from rrsq.runtime.format.loading import load_tokenizer
from tiny_quantized import load_tiny, logits_of, quantize_tiny, random_tokens, recipe_of, save_tiny


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_holds_what_a_hugging_face_folder_holds(qwen2_checkpoint: Path) -> None:
    names = {path.name for path in qwen2_checkpoint.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    config = json.loads((qwen2_checkpoint / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "rrsq"
    assert quantization["format_version"] == 2
    assert quantization["recipe"] == recipe_of("rrs-w4a4kv4").model_dump(mode="json")
    assert quantization["rotation"]["head"] == {"size": 16, "block": 16, "base": 1}
    assert quantization["rotation"]["blocks"] == 16
    assert quantization["rotation"]["residual"] is quantization["rotation"]["intermediate"] is None
    assert quantization["key_bits"] == [4, 4]
    assert "torch" in quantization["versions"]


def test_the_model_card_says_what_was_done(qwen2_checkpoint: Path) -> None:
    card = (qwen2_checkpoint / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    for text in ("tiny-qwen2", "rrs-w4a4kv4", "import rrsq", "from_pretrained", "random tokens", "INT4"):
        assert text in card


def test_tensors_have_the_designed_names_shapes_and_dtypes(qwen2_checkpoint: Path) -> None:
    tensors = load_file(qwen2_checkpoint / "model.safetensors")
    down = "model.layers.1.mlp.down_proj."
    assert tensors[down + "weight_packed"].shape == (64, 48)
    assert tensors[down + "weight_packed"].dtype == torch.uint8
    assert tensors[down + "weight_scale"].shape == (64,)
    assert tensors[down + "weight_scale"].dtype == torch.float32
    assert tensors[down + "weight_multiplier"].shape == (64, 3)
    assert tensors[down + "weight_multiplier"].dtype == torch.int8
    assert tensors[down + "weight"].shape == (1,)
    assert tensors[down + "weight"].dtype == torch.uint8
    assert tensors["model.layers.0.self_attn.q_proj.bias"].shape == (64,)
    assert tensors["model.layers.0.self_attn.kv_quantizer.keys.offset"].shape == (2, 16)
    assert "rotation_signs.residual_signs" not in tensors
    assert tensors["rotation_signs.head_signs"].shape == (16,)
    assert tensors["rotation_signs.head_signs"].dtype == torch.int8
    assert set(tensors["rotation_signs.head_signs"].tolist()) == {-1, 1}


def test_shards_hold_the_same_tensors(qwen2_checkpoint: Path, sharded_checkpoint: Path) -> None:
    shards = sorted(sharded_checkpoint.glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((sharded_checkpoint / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    together = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    alone = load_file(qwen2_checkpoint / "model.safetensors")
    assert together.keys() == alone.keys() == index["weight_map"].keys()
    assert all(torch.equal(together[name], tensor) for name, tensor in alone.items())


def test_a_sharded_checkpoint_loads(sharded_checkpoint: Path, quantized_qwen2: QuantizedModel) -> None:
    tokens = random_tokens(1, 12)
    expected = logits_of(quantized_qwen2.model, tokens)
    assert torch.equal(logits_of(rrsq.load(str(sharded_checkpoint)), tokens), expected)


def test_quantizing_twice_gives_the_same_bytes(
    qwen2_checkpoint: Path, tiny_qwen2_dir: Path, tmp_path: Path
) -> None:
    again = quantize_tiny(tiny_qwen2_dir, recipe_of("rrs-w4a4kv4"))
    out = save_tiny(again, tiny_qwen2_dir, tmp_path / "again")
    first, second = everything_in(qwen2_checkpoint), everything_in(out)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_a_tokenizer_with_several_chat_templates_is_written(
    quantized_qwen2: QuantizedModel, tiny_qwen2_dir: Path, tmp_path: Path
) -> None:
    """Such a tokenizer saves a folder of templates beside its files."""
    source = shutil.copytree(tiny_qwen2_dir, tmp_path / "tiny-qwen2")
    tokenizer = load_tokenizer(str(source))
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(source)
    out = save_tiny(quantized_qwen2, source, tmp_path / "out")
    assert load_tokenizer(str(out)).chat_template == tokenizer.chat_template


def test_writing_does_not_change_what_the_model_computes(tiny_llama_dir: Path, tmp_path: Path) -> None:
    quantized = quantize_tiny(tiny_llama_dir, recipe_of("rrs-w4a4kv4"))
    tokens = random_tokens(1, 12)
    before = logits_of(quantized.model, tokens)
    save_tiny(quantized, tiny_llama_dir, tmp_path / "out")
    assert torch.equal(logits_of(quantized.model, tokens), before)
    assert logits_of(load_tiny(tiny_llama_dir), tokens).shape == before.shape
