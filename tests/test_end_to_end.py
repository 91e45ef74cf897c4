"""Quantize, write, load in a fresh process, generate: every recipe on both tiny families."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import rrsq
from rrsq.recipe import recipe_names
from rrsq.runtime.format.loading import is_checkpoint, load_tokenizer
from tiny_quantized import logits_of, quantize_tiny, random_tokens, recipe_of, save_tiny

if TYPE_CHECKING:
    from torch import Tensor

    from rrsq.quantizer.pipeline import QuantizedModel

CASES = [f"{family} {name}" for family in ("llama", "qwen2") for name in recipe_names()]

# What a newcomer writes; the order of the two imports must not matter.
RRSQ_FIRST = "import rrsq\nfrom transformers import AutoModelForCausalLM"
TRANSFORMERS_FIRST = "from transformers import AutoModelForCausalLM\nimport rrsq"
FRESH_PROCESS = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
torch.set_num_threads(int(sys.argv[3]))
tokens = load_file(sys.argv[2])["tokens"]
results = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        results[folder.name + "|logits"] = model(tokens).logits
        results[folder.name + "|generated"] = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False
        )
save_file(results, sys.argv[4])
"""


@dataclass(frozen=True)
class Run:
    """A quantized model in this process and its checkpoint."""

    quantized: QuantizedModel
    checkpoint: Path


@pytest.fixture(scope="session")
def tokens() -> Tensor:
    return random_tokens(2, 21, seed=9)


@pytest.fixture(scope="session")
def runs(
    tiny_llama_dir: Path, tiny_qwen2_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Run]:
    """Every recipe on both families, by case."""
    folder = tmp_path_factory.mktemp("checkpoints")
    found = {}
    for case in CASES:
        family, name = case.split()
        source = {"llama": tiny_llama_dir, "qwen2": tiny_qwen2_dir}[family]
        quantized = quantize_tiny(source, recipe_of(name))
        found[case] = Run(quantized, save_tiny(quantized, source, folder / case.replace(" ", "-")))
    return found


def run_fresh(imports: str, folder: Path, tokens: Tensor, scratch: Path) -> dict[str, Tensor]:
    """Load all checkpoints of a folder in a new process; logits and generated tokens by name."""
    save_file({"tokens": tokens}, scratch / "in.safetensors")
    arguments = [folder, scratch / "in.safetensors", torch.get_num_threads(), scratch / "out.safetensors"]
    done = subprocess.run(
        [sys.executable, "-c", imports + FRESH_PROCESS, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return load_file(scratch / "out.safetensors")


@pytest.fixture(scope="session")
def fresh(
    runs: dict[str, Run], tokens: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tensor]:
    """What a process that imported rrsq before transformers computes."""
    folder = next(iter(runs.values())).checkpoint.parent
    return run_fresh(RRSQ_FIRST, folder, tokens, tmp_path_factory.mktemp("fresh"))


@pytest.mark.parametrize("case", CASES)
def test_a_fresh_process_computes_the_same_logits(
    case: str, runs: dict[str, Run], fresh: dict[str, Tensor], tokens: Tensor
) -> None:
    expected = logits_of(runs[case].quantized.model, tokens)
    assert torch.equal(fresh[case.replace(" ", "-") + "|logits"], expected)


@pytest.mark.parametrize("case", CASES)
def test_a_fresh_process_generates_the_same_tokens(
    case: str, runs: dict[str, Run], fresh: dict[str, Tensor], tokens: Tensor
) -> None:
    expected = runs[case].quantized.model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False
    )
    generated = fresh[case.replace(" ", "-") + "|generated"]
    assert generated.shape[1] > tokens.shape[1]
    assert torch.equal(generated, expected)


def test_the_order_of_imports_does_not_matter(
    runs: dict[str, Run], fresh: dict[str, Tensor], tokens: Tensor, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    names = ["llama-rrs-w4a4kv4", "qwen2-rrs-paper-w4a4kv4"]
    for name in names:
        (folder / name).symlink_to(next(iter(runs.values())).checkpoint.parent / name)
    again = run_fresh(TRANSFORMERS_FIRST, folder, tokens, tmp_path)
    assert len(again) == 2 * len(names)
    assert all(torch.equal(again[key], fresh[key]) for key in again)


def quantization_config(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config["quantization_config"]


@pytest.mark.parametrize("case", CASES)
def test_saving_a_loaded_model_round_trips(case: str, runs: dict[str, Run], tmp_path: Path) -> None:
    checkpoint = runs[case].checkpoint
    assert is_checkpoint(str(checkpoint))
    rrsq.load(str(checkpoint)).save_pretrained(tmp_path / "again")
    before = load_file(checkpoint / "model.safetensors")
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name
    assert quantization_config(checkpoint) == quantization_config(tmp_path / "again")


def test_a_round_trip_loads_and_computes_the_same(
    runs: dict[str, Run], tokens: Tensor, tmp_path: Path
) -> None:
    run = runs["llama rrs-w4a4kv4"]
    rrsq.load(str(run.checkpoint)).save_pretrained(tmp_path / "again", max_shard_size="40KB")
    assert (tmp_path / "again" / "model.safetensors.index.json").is_file()
    again = rrsq.load(str(tmp_path / "again"))
    assert torch.equal(logits_of(again, tokens), logits_of(run.quantized.model, tokens))


def test_a_tokenizer_comes_with_the_checkpoint(runs: dict[str, Run]) -> None:
    tokenizer = load_tokenizer(str(runs["qwen2 rrs-w4a4kv4"].checkpoint))
    text = "The river was old."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_half_precision_model_stays_one(
    family: str, dtype: str, tokens: Tensor, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source: Path = request.getfixturevalue(f"tiny_{family}_dir")
    quantized = quantize_tiny(source, recipe_of("rrs-w4a4kv4"), dtype=dtype)
    model = rrsq.load(str(save_tiny(quantized, source, tmp_path / "out")), device="cpu")
    assert model.dtype == getattr(torch, dtype)
    logits = logits_of(model, tokens)
    assert logits.dtype == getattr(torch, dtype)
    assert torch.equal(logits, logits_of(quantized.model, tokens))


def test_layers_with_8_bit_keys_survive_the_round_trip(
    tiny_llama_dir: Path, tokens: Tensor, tmp_path: Path
) -> None:
    quantized = quantize_tiny(tiny_llama_dir, recipe_of("rrs-w4a4kv4", ["kv_cache.sensitive_layers=1"]))
    out = save_tiny(quantized, tiny_llama_dir, tmp_path / "out")
    assert sorted(quantization_config(out)["key_bits"]) == [4, 4, 8]
    model: Any = rrsq.load(str(out))
    assert [layer.self_attn.kv_quantizer.keys.scheme.bits for layer in model.model.layers] == (
        quantized.key_bits
    )
    assert torch.equal(logits_of(model, tokens), logits_of(quantized.model, tokens))


@pytest.mark.parametrize(
    "overrides",
    [
        ["rotation.shards=2"],
        ["rotation.residual=false"],
        ["rotation.across_heads=false", "rotation.intermediate=false"],
        ["kv_cache.keys.zero_point=true", "kv_cache.values.offset=mean", "kv_cache.values.rotate=true"],
        ["activations.smoothing.inputs=[o, down]", "weights.group_size=null"],
        ["activations={bits: 4, smoothing: {scope: block, scales: real, channel_order: calibrated}}"],
        ["activations={bits: 4, smoothing: {scope: sequence, scales: real, channel_order: per_call}}"],
        ["activations={bits: 8, smoothing: {scales: real, statistic: token_normalized_max}}"],
        ["weights.signed=true", "weights.refinement=1", "kv_cache.values.signed=true", "head.bits=4"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_other_combinations_round_trip_too(
    overrides: list[str], tiny_llama_dir: Path, tokens: Tensor, tmp_path: Path
) -> None:
    quantized = quantize_tiny(tiny_llama_dir, recipe_of("rrs1-w4a4kv4", overrides))
    model = rrsq.load(str(save_tiny(quantized, tiny_llama_dir, tmp_path / "out")))
    assert torch.equal(logits_of(model, tokens), logits_of(quantized.model, tokens))
