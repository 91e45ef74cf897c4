"""The embedding in 8 and 4 bits: rounding, a tied head, checkpoints, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import rrsq
from rrsq.errors import CheckpointError, DataError, InterruptedRunError, RecipeError, UsageError
from rrsq.models import family_for
from rrsq.quantizer import embedding as quantizer
from rrsq.quantizer.embedding import quantize_embedding
from rrsq.quantizer.forecast import forecast
from rrsq.quantizer.pipeline import needs_calibration, quantize_model
from rrsq.quantizer.production.output_shards import planned_tensors
from rrsq.quantizer.production.produce import Calibration, OutputOptions, SourceModel, produce_checkpoint
from rrsq.recipe import Recipe
from rrsq.runtime.format.describe import checkpoint_contents
from rrsq.runtime.format.format import CalibrationInfo
from rrsq.runtime.format.loading import check_token_ids, load_tokenizer
from rrsq.runtime.modules.embedding import Int4Embedding, Int8Embedding, SharedHead
from rrsq.runtime.modules.int8_linear import Int8Linear
from rrsq.runtime.modules.linear import QuantizedLinear
from rrsq.runtime.scheme import check_recipe
from tiny_families import TINY, random_model, tiny_model
from tiny_quantized import (
    VOCABULARY_SIZE,
    load_tiny,
    logits_of,
    quantize_tiny,
    random_tokens,
    recipe_of,
    save_tiny,
)

ONLY = ["kv_cache=null", "weights.group_size=null"]


def only(*overrides: str) -> Recipe:
    """A recipe that leaves all else in full precision."""
    return recipe_of("w16a16kv4", [*ONLY, *overrides])


def rows_of(model: Any) -> torch.Tensor:
    return model.get_input_embeddings()(torch.arange(VOCABULARY_SIZE)).double()


def error(model: Any, exact: torch.Tensor, tokens: torch.Tensor) -> float:
    return float((logits_of(model, tokens) - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    ("overrides", "kind", "bound"),
    [
        (["embedding.bits=8"], Int8Embedding, 0.008),
        (["embedding.bits=4"], Int4Embedding, 0.11),
        (["embedding.bits=4", "embedding.blocks=1"], Int4Embedding, 0.11),
        (["embedding.bits=4", "embedding.group_size=8"], Int4Embedding, 0.09),
        (["embedding.bits=4", "embedding.group_size=null"], Int4Embedding, 0.13),
    ],
)
def test_rows_are_within_their_rounding(
    overrides: list[str], kind: type, bound: float, tiny_qwen2_dir: Path
) -> None:
    recipe = only(*overrides)
    assert not needs_calibration(recipe)
    original = load_tiny(tiny_qwen2_dir)
    exact, logits = rows_of(original).detach(), logits_of(original, random_tokens(2, 20))
    model: Any = quantize_tiny(tiny_qwen2_dir, recipe).model
    assert isinstance(model.get_input_embeddings(), kind)
    assert isinstance(model.lm_head, nn.Linear)
    found = float((rows_of(model) - exact).norm() / exact.norm())
    assert bound / 2 < found < bound
    assert error(model, logits, random_tokens(2, 20)) > bound / 20


def test_8_bit_rows_are_rounded_to_nearest(tiny_qwen2_dir: Path) -> None:
    exact = rows_of(load_tiny(tiny_qwen2_dir)).detach()
    found = rows_of(quantize_tiny(tiny_qwen2_dir, only("embedding.bits=8")).model)
    padding = exact.abs().amax(1) == 0
    assert int(padding.sum()) == 1
    assert not bool(found[padding].any())
    exact, found = exact[~padding], found[~padding]
    step = exact.abs().amax(1, keepdim=True) / 127
    codes = found / step
    assert float((codes - codes.round()).abs().max()) < 1e-4
    assert bool((codes.round().abs().amax(1) == 127).all())
    assert bool(((found - exact).abs() <= 0.50001 * step).all())


def test_rotation_spreads_outliers(tiny_qwen2_dir: Path) -> None:
    errors = []
    for blocks in (1, 32):
        model = load_tiny(tiny_qwen2_dir)
        with torch.no_grad():
            model.model.embed_tokens.weight[:, ::16] *= 8
        exact = rows_of(model).detach()
        recipe = only("embedding.bits=4", f"embedding.blocks={blocks}")
        quantized = quantize_model(model, recipe, None).model
        errors.append(float((rows_of(quantized) - exact).norm() / exact.norm()))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_are_rounded_a_few_at_a_time(
    bits: int, tiny_qwen2_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No copy of the whole table in float32, and each row is what it is by itself."""
    expected = rows_of(quantize_tiny(tiny_qwen2_dir, only(f"embedding.bits={bits}")).model)
    largest: list[int] = []
    for name in ("choose_grid", "round_rows"):
        inner = getattr(quantizer, name)

        def spy(piece: torch.Tensor, *args: Any, inner: Any = inner, **options: Any) -> Any:
            largest.append(piece.numel())
            return inner(piece, *args, **options)

        monkeypatch.setattr(quantizer, name, spy)
    monkeypatch.setattr(quantizer, "PIECE", 700)  # Ten rows of 64 channels.
    model = load_tiny(tiny_qwen2_dir)
    quantize_embedding(model, family_for(model.config), only(f"embedding.bits={bits}"), torch.device("cpu"))
    assert len(largest) == -(-VOCABULARY_SIZE // 10)
    assert max(largest) == 640
    assert torch.equal(rows_of(model), expected)


# Recipe, bits of the embedding and of the head; whether a tied head shares, or else what it is.
TIED = [
    ("rrs-w4a4kv4", 8, 16, SharedHead),
    ("rrs-w4a4kv4", 4, 16, SharedHead),
    ("rrs-w4a4kv4", 8, 8, SharedHead),
    ("rrs-w4a4kv4", 4, 8, Int8Linear),
    ("rrs-w4a4kv4", 8, 4, QuantizedLinear),
    ("rrs-w4a4kv4", 4, 4, QuantizedLinear),
    ("rrs1-w4a4kv4", 8, 16, nn.Linear),
    ("rrs1-w4a4kv4", 8, 8, Int8Linear),
]


@pytest.mark.parametrize(("recipe", "bits", "head_bits", "head"), TIED)
def test_a_tied_head_shares_where_nothing_is_folded_into_it(
    recipe: str, bits: int, head_bits: int, head: type, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    chosen = recipe_of(recipe, [f"embedding.bits={bits}", f"head.bits={head_bits}"])
    quantized = quantize_tiny(tiny_llama_dir, chosen)
    model: Any = quantized.model
    assert type(model.lm_head) is head
    assert model.config.tie_word_embeddings is (head is SharedHead)
    out = save_tiny(quantized, tiny_llama_dir, tmp_path / "out")
    stored = load_file(out / "model.safetensors")
    assert any(name.startswith("lm_head.") for name in stored) is (head is not SharedHead)
    assert {name: (x.shape, x.dtype) for name, x in stored.items()} == {
        name: (x.shape, x.dtype)
        for name, x in planned_tensors(load_tiny(tiny_llama_dir).config, torch.float32, chosen).items()
    }
    loaded = rrsq.load(str(out), device="cpu")
    tokens = random_tokens(2, 12)
    assert torch.equal(logits_of(loaded, tokens), logits_of(model, tokens))


def test_a_shared_head_gives_the_numbers_of_one_of_its_own(tiny_llama_dir: Path) -> None:
    """8 bits are rounded alike in both, so nothing but bytes is saved."""
    shared: Any = quantize_tiny(tiny_llama_dir, only("embedding.bits=8")).model
    model = load_tiny(tiny_llama_dir)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    own: Any = quantize_model(model, only("embedding.bits=8", "head.bits=8"), None).model
    assert type(own.lm_head) is Int8Linear
    tokens = random_tokens(2, 12)
    assert torch.equal(logits_of(shared, tokens), logits_of(own, tokens))


@pytest.mark.parametrize("name", ["llama", "gemma", "gemma3", "granite", "opt", "qwen2_moe"])
@pytest.mark.parametrize("bits", [8, 4])
def test_checkpoints_of_families(name: str, bits: int, tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Scaled, multiplied, with learned positions: what is loaded gives the bits of what was quantized."""
    recipe = recipe_of("rrs-w4a4kv4", [f"embedding.bits={bits}", "head.bits=16"])
    tokens = random_tokens(2, 12)
    exact = logits_of(tiny_model(name), tokens)
    alone: Any = quantize_model(tiny_model(name), only(f"embedding.bits={bits}"), None).model
    assert error(alone, exact, tokens) < {8: 0.03, 4: 0.4}[bits]
    quantized = quantize_model(tiny_model(name), recipe, random_tokens(2, 24, seed=1))
    out = save_tiny(quantized, tiny_llama_dir, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert torch.equal(logits_of(model, tokens), logits_of(quantized.model, tokens))
    made = model.generate(tokens, attention_mask=torch.ones_like(tokens), min_new_tokens=3, max_new_tokens=3)
    assert made.shape == (2, 15)
    model.tie_weights()
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


def test_layers_are_calibrated_behind_the_quantized_embedding(tiny_llama_dir: Path) -> None:
    windows = random_tokens(3, 20)
    original = load_tiny(tiny_llama_dir)
    recipe = recipe_of("w16a16kv4", ["embedding.bits=4"])
    model: Any = quantize_tiny(tiny_llama_dir, recipe, windows=windows, stream_dtype=torch.float32).model
    layer = original.model.layers[0]
    means = []
    for embedding in (original.model.embed_tokens, model.model.embed_tokens):
        with torch.no_grad():
            x = layer.input_layernorm(embedding(windows)).double().mean((0, 1))
            means.append(layer.self_attn.k_proj.weight.double() @ x)
    offset = model.model.layers[0].self_attn.kv_quantizer.keys.offset.flatten().double()
    assert float((offset - means[1]).norm()) < 1e-3 * float((offset - means[0]).norm())


def produced(model: Path, out: Path, recipe: Recipe, stop_at: str | None = None) -> Path:
    """Quantize layer by layer, as ``rrsq quantize`` does; stop as soon as a step is of this layer."""
    tokens = random_tokens(4, 32)
    info = CalibrationInfo(source="random", num_samples=4, sequence_length=32, fingerprint="0")

    def on_step(done: int, total: int, per_layer: int, text: str) -> None:
        if stop_at is not None and text.startswith(stop_at):
            raise KeyboardInterrupt

    tokenizer = load_tokenizer(str(model))
    source = SourceModel(str(model), tokenizer)
    produce_checkpoint(source, recipe, OutputOptions(out), Calibration(tokens, info), on_step=on_step)
    return out


@pytest.mark.parametrize("head_bits", [16, 4])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    head_bits: int, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    recipe = recipe_of("rrs-w4a4kv4", ["embedding.bits=4", f"head.bits={head_bits}"])
    whole = produced(tiny_llama_dir, tmp_path / "whole", recipe)
    with pytest.raises(InterruptedRunError):
        produced(tiny_llama_dir, tmp_path / "out", recipe, stop_at="layer 3/3: weights")
    out = produced(tiny_llama_dir, tmp_path / "out", recipe)
    for path in whole.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    windows = random_tokens(4, 32)
    in_memory: Any = quantize_tiny(tiny_llama_dir, recipe, windows=windows, stream_dtype=torch.bfloat16).model
    tokens = random_tokens(1, 9)
    assert torch.equal(logits_of(rrsq.load(str(out), device="cpu"), tokens), logits_of(in_memory, tokens))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("fixture", ["tiny_llama_dir", "tiny_qwen2_dir"])
def test_the_forecast_is_what_comes_out(
    fixture: str, bits: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder: Path = request.getfixturevalue(fixture)
    recipe = recipe_of("rtn-w4a4", ["rotation=null", f"embedding.bits={bits}"])
    found = forecast(str(folder), recipe, num_samples=4, sequence_length=32)
    out = produced(folder, tmp_path / "out", recipe)
    contents = checkpoint_contents(out)
    assert found.contents == contents
    assert ("output head" in contents) == (fixture == "tiny_qwen2_dir")
    _, size, weights = contents["embedding"]
    hidden = {"tiny_llama_dir": 96, "tiny_qwen2_dir": 64}[fixture]
    assert weights == VOCABULARY_SIZE * hidden + 1  # The one that stops other loaders.
    assert size == VOCABULARY_SIZE * (hidden * bits // 8 + 4 + (hidden // 32 if bits == 4 else 0)) + 1


@pytest.fixture(scope="module")
def checkpoint(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model whose head shares the codes of an embedding in 4 bits."""
    quantized = quantize_tiny(tiny_llama_dir, recipe_of("rrs-w4a4kv4", ["embedding.bits=4", "head.bits=16"]))
    return save_tiny(quantized, tiny_llama_dir, tmp_path_factory.mktemp("embedding") / "out")


@pytest.mark.parametrize("leaf", ["weight_packed", "weight_scale", "weight_multiplier", "weight"])
def test_a_missing_tensor_is_an_error(leaf: str, checkpoint: Path, tmp_path: Path) -> None:
    out = damaged(checkpoint, tmp_path, lambda tensors: tensors.pop(f"model.embed_tokens.{leaf}"))
    with pytest.raises(CheckpointError, match=rf"lacks the tensor 'model\.embed_tokens\.{leaf}'"):
        rrsq.load(str(out), device="cpu")


@pytest.mark.parametrize(
    ("leaf", "value", "message"),
    [
        ("weight_scale", torch.zeros(VOCABULARY_SIZE), "a scale that is not a positive finite number"),
        ("weight_multiplier", torch.zeros(VOCABULARY_SIZE, 3, dtype=torch.int8), "a multiplier that is zero"),
        ("weight_packed", torch.zeros(7, 48, dtype=torch.uint8), r"has shape \[7, 48\]"),
        ("weight_int8", torch.zeros(VOCABULARY_SIZE, 96, dtype=torch.int8), "have no use"),
    ],
)
def test_what_no_quantization_makes_is_an_error(
    leaf: str, value: torch.Tensor, message: str, checkpoint: Path, tmp_path: Path
) -> None:
    out = damaged(checkpoint, tmp_path, lambda tensors: tensors.update({f"model.embed_tokens.{leaf}": value}))
    with pytest.raises(CheckpointError, match=message):
        rrsq.load(str(out), device="cpu")


def damaged(checkpoint: Path, folder: Path, change: Any) -> Path:
    """A copy of a checkpoint with other tensors."""
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_another_size_is_refused(checkpoint: Path) -> None:
    model: Any = rrsq.load(str(checkpoint), device="cpu")
    embedding = model.get_input_embeddings()
    for unchanged in ((), (None,), (VOCABULARY_SIZE,)):
        assert model.resize_token_embeddings(*unchanged) is embedding
    for options in ({"new_num_tokens": 520}, {"pad_to_multiple_of": 64}):
        with pytest.raises(UsageError, match=r"cannot be resized.*embedding\.bits=16"):
            model.resize_token_embeddings(**options)
    assert model.get_input_embeddings() is embedding
    check_token_ids(model, torch.tensor([[0, VOCABULARY_SIZE - 1]]))
    with pytest.raises(DataError, match=f"knows {VOCABULARY_SIZE} tokens"):
        check_token_ids(model, torch.tensor([[VOCABULARY_SIZE]]))


def test_another_size_is_refused_for_the_head_alone(tiny_qwen2_dir: Path, tmp_path: Path) -> None:
    quantized = quantize_tiny(tiny_qwen2_dir, recipe_of("rrs-w4a4kv4", ["embedding.bits=16"]))
    model: Any = rrsq.load(str(save_tiny(quantized, tiny_qwen2_dir, tmp_path / "out")), device="cpu")
    assert model.resize_token_embeddings(VOCABULARY_SIZE) is model.get_input_embeddings()
    with pytest.raises(UsageError, match=r"output head .* cannot be resized.*head\.bits=16"):
        model.resize_token_embeddings(520)


def test_a_pattern_keeps_the_embedding_or_the_head(tiny_llama_dir: Path) -> None:
    kept: Any = quantize_tiny(
        tiny_llama_dir, recipe_of("rrs-w4a4kv4", ["head.bits=16", "modules_to_not_convert=['*embed*']"])
    ).model
    assert kept.lm_head.weight is kept.model.embed_tokens.weight
    own: Any = quantize_tiny(
        tiny_llama_dir, recipe_of("rrs-w4a4kv4", ["modules_to_not_convert=[lm_head]"])
    ).model
    assert isinstance(own.model.embed_tokens, Int8Embedding)
    assert type(own.lm_head) is nn.Linear
    assert torch.equal(own.lm_head.weight, load_tiny(tiny_llama_dir).lm_head.weight)


def test_an_odd_row_cannot_be_in_4_bits() -> None:
    config = TINY["opt"]()
    config.hidden_size = config.word_embed_proj_dim = 45
    config.num_attention_heads = 5
    model = random_model(config)
    patterns = "modules_to_not_convert=['*layers*']"
    with pytest.raises(RecipeError, match=r"embed_tokens' has 45 channels.*embedding\.bits=8"):
        check_recipe(only("embedding.bits=4", patterns), family_for(config), model)
    check_recipe(only("embedding.bits=8", patterns), family_for(config), model)


def test_a_shared_head_finds_codes_that_are_elsewhere(checkpoint: Path, tmp_path: Path) -> None:
    """Offloaded to memory or the disk, they are there for the head as they are for a lookup."""
    tokens = random_tokens(2, 12)
    expected = logits_of(rrsq.load(str(checkpoint), device="cpu"), tokens)
    offloaded: Any = rrsq.load(str(checkpoint), device="cpu")
    cpu_offload(offloaded, torch.device("cpu"), offload_buffers=True)
    dispatched: Any = rrsq.load(str(checkpoint), device="cpu")
    places = dict.fromkeys(("model.layers", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {"model.embed_tokens": "disk", "rotation_signs": "cpu"}
    dispatch_model(dispatched, places, offload_dir=str(tmp_path), offload_buffers=True)
    for model in (offloaded, dispatched):
        assert model.model.embed_tokens.weight_packed.is_meta
        for _ in range(3):
            assert torch.equal(logits_of(model, tokens), expected)
    # What comes from the disk is another tensor each time, of which nothing derived is kept.
    assert dispatched.model.embed_tokens._operand is None
