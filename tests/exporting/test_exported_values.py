"""An export stands for its checkpoint's numbers: read by the documented layout, and by compressed-tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import rrsq
from exporting.conftest import Make
from exporting.exported import CASES
from exporting.plain import decoded_weights, plain_model, scheme_of, stored
from rrsq.exporting.schemes import LinearScheme
from rrsq.exporting.tensors import export_linear, pack_words
from rrsq.models import family_for
from rrsq.runtime.modules.int8_linear import Int8Linear
from rrsq.runtime.modules.linear import QuantizedLinear
from tiny_families import TINY
from tiny_models import save_tiny_model
from tiny_quantized import load_tiny, logits_of, quantize_tiny, random_tokens, recipe_of, save_tiny

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENS = random_tokens(2, 40, seed=3)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference over the largest magnitude."""
    return float((ours - theirs).abs().max() / ours.abs().max())


def exported(checkpoint: Path, folder: Path, **options: Any) -> Path:
    rrsq.export(checkpoint, folder, **{"dtype": "float32", **options})
    return folder


@pytest.mark.parametrize("case", CASES)
def test_weights_and_logits_are_the_checkpoints(case: str, make: Make, tmp_path: Path) -> None:
    recipe, overrides = CASES[case]
    checkpoint = make(recipe, overrides)
    folder = exported(checkpoint, tmp_path / "out")
    model: Any = rrsq.load(checkpoint, device="cpu", dtype="float32")
    decoded = decoded_weights(folder)
    quantized = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, QuantizedLinear | Int8Linear)
    }
    assert decoded.keys() == quantized.keys()
    for path, module in quantized.items():
        if isinstance(module, QuantizedLinear):
            ours = module.dequantized_weight()
        else:
            ours = module.weight_int8.float() * module.weight_scale.unsqueeze(1)
        # Once more rounded to float32 where a scale was multiplied by its multiplier first.
        torch.testing.assert_close(torch.tensor(decoded[path]).float(), ours, rtol=2e-7, atol=0)
    ours, theirs = logits_of(model, TOKENS), logits_of(plain_model(folder), TOKENS)
    by_token = (ours - theirs).abs().amax(-1) / ours.abs().max()
    # An 8-bit code of an entry that is between two may be another: of a token, not of all.
    assert float(by_token.quantile(0.8)) < 1e-5
    assert float(by_token.max()) < 1e-2


def test_the_cases_are_what_they_say(make: Make, tmp_path: Path) -> None:
    def weights(case: str, path: str) -> Any:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        scheme = scheme_of(exported(make(*CASES[case]), folder), path)
        return None if scheme is None else scheme["weights"] | {"input": scheme["input_activations"]}

    down, head = "model.layers.1.mlp.down_proj", "lm_head"
    assert weights("groups of two sizes", down)["group_size"] == 64
    assert weights("groups of two sizes", "model.layers.1.mlp.up_proj")["group_size"] == 128
    assert weights("larger groups than Marlin's", "model.layers.1.mlp.up_proj")["group_size"] == 128
    assert weights("zero points", down)["symmetric"] is False
    assert weights("a scale a row, 8-bit head", down)["strategy"] == "channel"
    assert weights("a scale a row, 8-bit head", head)["num_bits"] == 8
    assert weights("4-bit head", head)["num_bits"] == 4
    assert weights("int8 inputs", down)["input"]["dynamic"] is True
    assert weights("int8 inputs", head) is None
    assert weights("mixed", "model.layers.0.self_attn.o_proj") is None
    assert weights("mixed", "model.layers.1.self_attn.o_proj")["num_bits"] == 4


@pytest.mark.parametrize("case", CASES)
def test_compressed_tensors_gives_the_same_logits(case: str, make: Make, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors needs Python 3.11")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    recipe, overrides = CASES[case]
    folder = exported(make(recipe, overrides), tmp_path / "out")
    options: dict[str, Any] = {}
    if case == "zero points":
        # Otherwise transformers expects zero points that are not packed, and refuses those of the format.
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    plain = plain_model(folder, levels=127.5)
    assert difference(logits_of(plain, TOKENS), logits_of(theirs, TOKENS)) < 1e-5


def test_nothing_of_rrsq_is_needed(make: Make, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors needs Python 3.11")
    checkpoint = make()
    folder = exported(checkpoint, tmp_path / "out")
    code = (
        "import json, sys; sys.modules['rrsq'] = None\n"
        "import torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokens = torch.tensor(json.loads(sys.argv[2]))\n"
        "print('\\n' + json.dumps(model(tokens).logits[0, -1].tolist()))"
    )
    tokens = TOKENS[:1]
    words = [sys.executable, "-c", code, str(folder), json.dumps(tokens.tolist())]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    theirs = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    ours = logits_of(rrsq.load(checkpoint, device="cpu", dtype="float32"), tokens)[0, -1]
    assert difference(ours, theirs) < 1e-5


# Families that can be exported, and what their recipe must leave out: R1 is in the way of norms behind
# attention and MLP and of LayerNorms, and vLLM's Gemma has no head of its own.
WITHOUT_R1 = ("gemma", "gemma2", "gemma3_text", "olmo2", "olmo3", "exaone4", "starcoder2", "opt")
FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "granite",
    "seed_oss",
    "smollm3",
    "arcee",
    *WITHOUT_R1,
)
SIZES = {
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "head_dim": 16,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = TINY[name]()
    for field, size in SIZES.items():
        if getattr(config, field, None) is not None:
            setattr(config, field, size)
    source = save_tiny_model(config, tiny_tokenizer, tmp_path / "model")
    without = ["rotation.residual=false"] if name in WITHOUT_R1 else []
    recipe = recipe_of("w4a16-rotated", ["weights.group_size=32", *without])
    checkpoint = save_tiny(quantize_tiny(source, recipe), source, tmp_path / "checkpoint")
    folder = exported(checkpoint, tmp_path / "out")
    ours = logits_of(rrsq.load(checkpoint, device="cpu", dtype="float32"), TOKENS)
    assert difference(ours, logits_of(plain_model(folder), TOKENS)) < 1e-5
    full = logits_of(load_tiny(source), TOKENS)
    assert difference(full, ours) > 1e-3  # Something was quantized.
    assert family_for(config).model_type == name


def test_scales_are_rounded_as_the_report_says(make: Make, tmp_path: Path) -> None:
    exact = stored(exported(make(), tmp_path / "exact"))
    report = rrsq.export(make(), tmp_path / "half", dtype="float16")
    half = stored(tmp_path / "half")
    errors = []
    for name, scale in exact.items():
        if name.endswith("weight_scale"):
            assert (half[name] == scale.astype("float16")).all()
            errors.append(abs(half[name].astype("float64") / scale - 1).max())
        elif name.endswith("weight_packed"):
            assert (half[name] == scale).all()
    assert report.scale_error == pytest.approx(max(errors), rel=1e-6)
    assert 0 < report.scale_error < 2**-11
    assert (report.dtype, report.dropped_cache) == ("float16", False)


def linear(scale: float) -> dict[str, torch.Tensor]:
    codes = torch.randint(-8, 8, (8, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    codes[1] = 0
    row_scale = torch.full((8,), scale)
    row_scale[1] = torch.finfo(torch.float32).tiny  # As a row of zeros has it.
    return {
        "weight_packed": rrsq_pack(codes),
        "weight_scale": row_scale,
        "weight_multiplier": torch.ones(8, 2, dtype=torch.uint8),
    }


def rrsq_pack(codes: torch.Tensor) -> torch.Tensor:
    from rrsq.kernels.packing import pack_int4

    return pack_int4(codes)


def test_a_scale_that_a_dtype_cannot_hold_is_refused_unless_its_codes_are_zero() -> None:
    from rrsq.errors import ExportError

    scheme = LinearScheme(4, 32)
    done = export_linear("a.b", scheme, linear(1e-3), torch.float16)
    assert done.scale_error < 2**-11
    for scale, dtype in ((1e-9, torch.float16), (1e6, torch.float16), (3e-6, torch.float16)):
        with pytest.raises(ExportError, match=r"float16 cannot hold the scales of 'a\.b'"):
            export_linear("a.b", scheme, linear(scale), dtype)
        assert export_linear("a.b", scheme, linear(scale), torch.bfloat16).scale_error < 2**-8


@pytest.mark.parametrize(("bits", "columns"), [(4, 8), (4, 24), (4, 13), (8, 4), (8, 7)])
def test_words_are_packed_from_their_lowest_bits(bits: int, columns: int) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = torch.randint(low, high, (5, columns), generator=torch.Generator().manual_seed(1))
    packed = pack_words(codes.to(torch.int8), bits)
    in_word = 32 // bits
    assert packed.shape == (5, -(-columns // in_word))
    for row, words in zip(codes.tolist(), packed.tolist(), strict=True):
        for word, start in zip(words, range(0, columns, in_word), strict=True):
            expected = sum(
                (code - low) << (bits * place) for place, code in enumerate(row[start : start + in_word])
            )
            assert word % 2**32 == expected
