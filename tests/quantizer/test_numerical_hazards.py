"""Numerical hazards end in a finite model, with a warning that names the layer if it matters, or an error."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rrsq.errors import DataError, NonFiniteError
from rrsq.kernels.packing import CODE_MAX, CODE_MIN
from rrsq.quantizer.gptq import factor_hessian, gptq_codes
from rrsq.quantizer.grid import choose_grid, round_to_grid
from rrsq.quantizer.pipeline import QuantizedModel, quantize_model
from tiny_families import tiny_model
from tiny_quantized import load_tiny, logits_of, random_tokens, recipe_of, save_tiny

RECIPES = ("rrs-w4a4kv4", "rrs-paper-w4a4kv4", "rtn-w4a4")


def layer(model: Any, index: int = 1) -> Any:
    return model.model.layers[index]


def zero_rows(model: Any) -> None:
    layer(model).mlp.up_proj.weight[3:7] = 0
    layer(model).self_attn.q_proj.weight[0] = 0


def zero_matrix(model: Any) -> None:
    layer(model).mlp.down_proj.weight.zero_()
    layer(model).self_attn.k_proj.weight.zero_()


def equal_rows(model: Any) -> None:
    layer(model).mlp.gate_proj.weight[:] = layer(model).mlp.gate_proj.weight[0]
    layer(model).self_attn.v_proj.weight.fill_(0.25)


def dead_channels(model: Any) -> None:
    layer(model).mlp.up_proj.weight[::2] = 0  # Inputs of down_proj, before its rotation.
    model.model.embed_tokens.weight[:, ::3] = 0


def zero_embeddings(model: Any) -> None:
    model.model.embed_tokens.weight[: len(model.model.embed_tokens.weight) // 2] = 0


def denormals(model: Any) -> None:
    layer(model).mlp.up_proj.weight.mul_(1e-42)
    layer(model).self_attn.o_proj.weight.mul_(1e-40)


def huge_and_tiny(model: Any) -> None:
    layer(model).mlp.up_proj.weight.mul_(2.0**100)
    layer(model).mlp.down_proj.weight.mul_(2.0**-100)


HAZARDS: dict[str, Callable[[Any], None]] = {
    function.__name__: function
    for function in (
        zero_rows,
        zero_matrix,
        equal_rows,
        dead_channels,
        zero_embeddings,
        denormals,
        huge_and_tiny,
    )
}
# Where nothing reaches an input, or its squares leave float32, GPTQ has no Hessian.
FALLS_BACK = {"denormals", "huge_and_tiny"}


def run(model: Any, recipe: str, windows: Tensor, *overrides: str) -> tuple[QuantizedModel, list[str]]:
    """Quantize; also return the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantized = quantize_model(model, recipe_of(recipe, overrides), windows)
    return quantized, [str(warning.message) for warning in caught]


def assert_finite(quantized: QuantizedModel) -> None:
    """All tensors, the report and the logits."""
    for name, tensor in quantized.model.state_dict().items():
        assert not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()), name
        assert not name.endswith("weight_scale") or bool((tensor > 0).all()), name
    for entry in quantized.report.layers:
        for number in (entry.output_snr_db, entry.cache_error):
            assert number is None or number == number
    assert bool(torch.isfinite(logits_of(quantized.model, random_tokens(2, 8))).all())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("hazard", HAZARDS)
def test_hazardous_weights(hazard: str, recipe: str, tiny_qwen2_dir: Path, tmp_path: Path) -> None:
    model = load_tiny(tiny_qwen2_dir)
    with torch.no_grad():
        HAZARDS[hazard](model)
    quantized, messages = run(model, recipe, random_tokens(2, 24))
    assert_finite(quantized)
    uses_gptq = quantized.recipe.weights.method == "gptq"
    fallbacks = [message for message in messages if "could not be factored" in message]
    assert len(fallbacks) == len(quantized.report.fallbacks) == len(messages)
    if hazard in FALLS_BACK and uses_gptq:
        assert "layer 1 mlp.down" in quantized.report.fallbacks
        assert any("Layer 1, input 'mlp.down'" in message for message in messages)
    else:
        assert not messages
    # What is written passes the checks of loading.
    import rrsq

    loaded = rrsq.load(str(save_tiny(quantized, tiny_qwen2_dir, tmp_path / "out")), device="cpu")
    tokens = random_tokens(1, 8)
    assert torch.equal(logits_of(loaded, tokens), logits_of(quantized.model, tokens))


def test_an_input_that_is_always_zero_falls_back_and_is_named(tiny_qwen2_dir: Path) -> None:
    model = load_tiny(tiny_qwen2_dir)
    with torch.no_grad():
        layer(model).mlp.up_proj.weight.zero_()
    quantized, messages = run(model, "rrs-w4a4kv4", random_tokens(2, 24))
    assert_finite(quantized)
    assert quantized.report.fallbacks == ["layer 1 mlp.down"]
    assert len(messages) == 1
    assert "Layer 1, input 'mlp.down': the Hessian could not be factored" in messages[0]
    # Zeros in calibration do not make the weights zero.
    assert float(quantized.model.model.layers[1].mlp.down_proj.dequantized_weight().abs().max()) > 0


@pytest.mark.parametrize("recipe", RECIPES[:2])
@pytest.mark.parametrize(
    "windows",
    [torch.full((1, 1), 7), torch.full((3, 16), 7), torch.arange(2, 4)[None]],
    ids=["one-token", "one-token-repeated", "two"],
)
def test_hardly_any_calibration(windows: Tensor, recipe: str, tiny_qwen2_dir: Path) -> None:
    quantized, messages = run(load_tiny(tiny_qwen2_dir), recipe, windows)
    assert_finite(quantized)
    assert not messages


def test_tokens_that_the_model_does_not_know(tiny_qwen2_dir: Path) -> None:
    for token in (-1, 512, 10**9):
        with pytest.raises(DataError, match="the model knows 512 tokens"):
            run(load_tiny(tiny_qwen2_dir), "rrs-w4a4kv4", torch.full((1, 4), token))


@pytest.mark.parametrize(
    ("path", "factor", "where"),
    [
        ("layers.0.mlp.up_proj.weight", 1e38, "Layer 0, input 'mlp.down'"),
        ("layers.1.self_attn.v_proj.weight", 1e38, "Layer 1, input 'self_attn.o'"),
        ("layers.1.mlp.down_proj.weight", 1e38, "Layer 1, output"),
    ],
)
def test_activations_that_overflow_are_named(
    path: str, factor: float, where: str, tiny_qwen2_dir: Path
) -> None:
    """Products of weights and activations beyond float32: Inf, then NaN."""
    model = load_tiny(tiny_qwen2_dir)
    with torch.no_grad():
        weight = model.model.get_parameter(path)
        weight.div_(weight.abs().max()).mul_(factor)
        model.model.layers[0].post_attention_layernorm.weight.mul_(100)
        model.model.layers[1].input_layernorm.weight.mul_(100)
        model.model.layers[1].mlp.up_proj.weight.mul_(100)
    with pytest.raises(NonFiniteError, match=f"^{where}: NaN or Inf on the calibration text"):
        run(model, "rrs-w4a4kv4", random_tokens(2, 24), "rotation=null")


def test_norm_gains_that_overflow_when_they_are_folded(tiny_qwen2_dir: Path) -> None:
    model = load_tiny(tiny_qwen2_dir)
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.fill_(3e38)
        model.model.layers[1].self_attn.q_proj.weight.mul_(1e3)
    with pytest.raises(NonFiniteError, match=r"Layer 1|layers\.1"):
        run(model, "rtn-w4a4", random_tokens(2, 24))


def test_a_dtype_that_has_no_room_for_the_folded_head(tiny_qwen2_dir: Path) -> None:
    model = load_tiny(tiny_qwen2_dir, "float16")
    with torch.no_grad():
        model.model.norm.weight.fill_(60000.0)
        model.lm_head.weight.mul_(100)
    with pytest.raises(NonFiniteError, match=r"'lm_head\.weight' NaN or Inf in torch\.float16"):
        run(model, "rtn-w4a4", random_tokens(2, 24), "rotation={residual: true}")


@pytest.mark.parametrize("hazard", ["zero", "equal", "huge"])
def test_hazardous_experts(hazard: str) -> None:
    model = tiny_model("qwen3_moe")
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "gate_up_proj") and hazard == "zero":
                module.gate_up_proj[1] = 0
                module.down_proj[2] = 0
            elif hasattr(module, "gate_up_proj") and hazard == "equal":
                module.gate_up_proj[:] = module.gate_up_proj[0, 0]
            elif hasattr(module, "gate_up_proj"):
                inner = module.gate_up_proj.shape[1] // 2
                module.gate_up_proj[0, inner:] *= 2.0**100
                module.down_proj[0] *= 2.0**-100
    quantized, messages = run(model, "rrs-w4a4kv4", random_tokens(3, 32))
    assert_finite(quantized)
    fallbacks = [message for message in messages if "could not be factored" in message]
    assert bool(fallbacks) == bool(quantized.report.fallbacks) == (hazard in ("zero", "huge"))
    expert = {"zero": "1.down", "huge": "0.down"}.get(hazard)
    assert expert is None or all(expert in message for message in fallbacks)


@pytest.mark.parametrize("exponent", [-100, -60, -30, 0, 30, 60, 100])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("search", [False, True])
def test_a_grid_does_not_depend_on_the_magnitude(exponent: int, group_size: int | None, search: bool) -> None:
    """Powers of two change no digit, so they must change no code."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 64, generator=generator) * torch.rand(24, 1, generator=generator)
    expected = choose_grid(weight, group_size, search=search)
    scaled = weight * 2.0**exponent
    grid = choose_grid(scaled, group_size, search=search)
    assert torch.equal(grid.scale, expected.scale * 2.0**exponent)
    if group_size is not None:
        assert torch.equal(grid.multiplier, expected.multiplier)
    codes = round_to_grid(scaled, grid.steps(64))
    assert torch.equal(codes, round_to_grid(weight, expected.steps(64)))
    assert int(codes.abs().max()) >= 7


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-40, 1e-38, 1e30, 3.4e38, -3.4e38])
@pytest.mark.parametrize("group_size", [None, 16])
def test_extreme_rows_have_a_scale_and_codes_in_range(value: float, group_size: int | None) -> None:
    weight = torch.full((3, 32), value)
    weight[1, ::2] = 0
    grid = choose_grid(weight, group_size)
    assert bool(torch.isfinite(grid.scale).all())
    assert bool((grid.scale > 0).all())
    steps = grid.steps(32)
    codes = round_to_grid(weight, steps)
    assert int(codes.min()) >= CODE_MIN
    assert int(codes.max()) <= CODE_MAX
    error = (codes.double() * steps.double() - weight.double()).abs().max()
    assert float(error) <= max(0.51 * float(steps.double().max()), 0.0)


def matrices() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 48, generator=generator)
    one = torch.randn(1, 48, generator=generator)
    with_dead = x.clone()
    with_dead[:, 5::7] = 0
    return {
        "one-token": one.T @ one,
        "one-token-repeated": 1e4 * one.T @ one,
        "rank-two": x[:2].T @ x[:2],
        "equal-channels": torch.ones(48, 48),
        "dead": with_dead.T @ with_dead,
        "huge": (x.T @ x) * 1e30,
        "tiny": (x.T @ x) * 1e-30,
        "one-huge-channel": torch.diag(torch.tensor([1e36] + [1.0] * 47)),
        "zero": torch.zeros(48, 48),
        "denormal": torch.full((48, 48), 1e-42),
        "inf": torch.full((48, 48), torch.inf),
        "nan": torch.full((48, 48), torch.nan),
        "negative": -(x.T @ x),
        "indefinite": torch.diag(torch.tensor([1.0] * 47 + [-50.0])) + 30 * (1 - torch.eye(48)),
    }


@pytest.mark.parametrize("name", matrices())
@pytest.mark.parametrize("act_order", [False, True])
def test_hazardous_hessians(name: str, act_order: bool) -> None:
    """In the Hessian's norm GPTQ is no worse than rounding to nearest, or it says that it fell back."""
    hessian = matrices()[name]
    weight = torch.randn(10, 48, generator=torch.Generator().manual_seed(2))
    grid = choose_grid(weight, None)
    steps = grid.steps(48)
    factor = factor_hessian(hessian, act_order=act_order, damping=0.01)
    result = gptq_codes(weight, grid, factor)
    assert int(result.codes.min()) >= CODE_MIN
    assert int(result.codes.max()) <= CODE_MAX
    nearest = round_to_grid(weight, steps)
    if name in ("zero", "inf", "nan", "negative"):
        assert not result.used_gptq
    if not result.used_gptq:
        assert torch.equal(result.codes, nearest)
        return

    def loss(codes: Tensor) -> float:
        error = (codes * steps - weight).double()
        error[:, hessian.diagonal() <= 0] = 0
        return float(torch.einsum("oi,ij,oj->", error, hessian.double(), error))

    assert loss(result.codes) <= 1.05 * loss(nearest) + 1e-6 * float(hessian.double().abs().max())
