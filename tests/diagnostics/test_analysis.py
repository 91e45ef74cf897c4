"""The analysis of an input against float64 computations on the unmodified model's own activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rrsq.diagnostics.analysis import STAGES
from rrsq.models import family_for
from rrsq.quantizer.calibration.stored import StoredCalibration
from rrsq.quantizer.fold.rotations import rotate_model
from rrsq.quantizer.pipeline import quantize_model
from rrsq.runtime.rotation.rotations import make_rotations
from tiny_calibration import LENGTH, calibrate_tiny, tiny_windows
from tiny_quantized import load_tiny, recipe_of

LINEARS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
RECIPES = {
    "in blocks": ("rrs-w4a4kv4", ("rotation.balance=false",)),
    "first generation": ("rrs1-w4a4kv4", ()),
    "as published": ("rrs-paper-w4a4kv4", ()),
    "sorted in each call": ("rrs-paper-w4a4kv4", ("activations.smoothing.channel_order=per_call",)),
    "no rotation": ("rtn-w4a4", ()),
    "weights only": ("gptq-w4a16", ()),
    "cache only": ("w16a16kv4", ()),
}


def inputs_of(model: Any) -> list[dict[str, Tensor]]:
    """What each linear input of each layer is, ``[windows, tokens, channels]``, from hooks on one forward."""
    seen: list[dict[str, Tensor]] = [{} for _ in model.model.layers]
    for store, layer in zip(seen, model.model.layers, strict=True):
        for name, paths in LINEARS.items():
            linear = layer.get_submodule(paths[0])
            linear = getattr(linear, "linear", linear)
            linear.register_forward_pre_hook(
                lambda module, args, store=store, name=name: store.__setitem__(name, args[0].detach())
            )
    with torch.inference_mode():
        model(tiny_windows())
    return seen


def rotated_model(source: Path, recipe: Any, seed: int = 0) -> Any:
    model = load_tiny(source)
    if recipe.rotation is not None:
        family = family_for(model.config)
        sizes = family.sizes(model.config)
        rotate_model(model, family, make_rotations(recipe.rotation, sizes, seed), sizes)
    return model


@pytest.fixture(scope="module")
def original(tiny_llama_dir: Path) -> list[dict[str, Tensor]]:
    return inputs_of(load_tiny(tiny_llama_dir))


@pytest.fixture(scope="module", params=RECIPES.values(), ids=RECIPES)
def case(
    request: pytest.FixtureRequest, tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, StoredCalibration]:
    name, overrides = request.param
    folder = tmp_path_factory.mktemp("analysis") / "calib"
    return recipe_of(name, overrides), calibrate_tiny(tiny_llama_dir, folder, name, overrides)


def rms_of_the_median_token(x: np.ndarray) -> float:
    """The lower of the two in the middle, as torch takes it."""
    return float(np.sort(np.sqrt((x**2).mean(2)).flatten())[(x.shape[0] * x.shape[1] - 1) // 2])


def test_ratios_and_profiles_are_those_of_the_activations(
    case: tuple[Any, StoredCalibration], original: list[dict[str, Tensor]], tiny_llama_dir: Path
) -> None:
    recipe, stored = case
    rotated = inputs_of(rotated_model(tiny_llama_dir, recipe))
    for index in range(3):
        for name, numbers in stored.numbers(index).items():
            for stage, source in enumerate((original, rotated)):
                x = source[index][name].double().numpy()
                ratio = (np.abs(x).max(2) / np.sqrt((x**2).mean(2))).mean()
                assert numbers["ratio"][STAGES[stage]] == pytest.approx(ratio, rel=1e-3)
                unit = rms_of_the_median_token(x)
                channels = stored.tensor(index, f"{name}.report.channel_absmax")[stage].numpy()
                np.testing.assert_allclose(channels, np.abs(x).max((0, 1)) / unit, rtol=2e-3, atol=1e-3)
                tokens = stored.tensor(index, f"{name}.report.token_absmax")[stage].numpy()
                np.testing.assert_allclose(tokens, np.abs(x[0]).max(1) / unit, rtol=2e-3)
                cells = stored.tensor(index, f"{name}.report.magnitudes")[stage]
                assert cells.shape == (LENGTH, min(128, x.shape[2]))
                assert float(cells.max()) == pytest.approx(np.abs(x[0]).max() / unit, rel=2e-3)


def test_spikes_are_the_largest_tokens(
    case: tuple[Any, StoredCalibration], original: list[dict[str, Tensor]]
) -> None:
    _, stored = case
    for index in range(3):
        for name, numbers in stored.numbers(index).items():
            largest = original[index][name].abs().amax(2)
            top = largest.flatten().topk(3)
            for (window, position, magnitude), value in zip(numbers["spikes"], top.values, strict=True):
                assert magnitude == pytest.approx(float(value), rel=1e-3)
                assert float(largest[window, position]) == pytest.approx(magnitude, rel=1e-3)
            assert numbers["median_magnitude"] == pytest.approx(float(largest.median()), rel=1e-3)


def test_errors_are_those_of_the_quantized_modules(
    case: tuple[Any, StoredCalibration], tiny_llama_dir: Path
) -> None:
    """Modules that the pipeline made with RTN, on what the linears of the rotated model read and give."""
    recipe, stored = case
    if recipe.weights.bits == 16:
        for index in range(3):
            for numbers in stored.numbers(index).values():
                assert numbers["output_error"] == numbers["activation_error"] == numbers["weight_error"] == 0
        return
    weights = recipe.weights.model_copy(update={"method": "rtn"})
    nearest = recipe.model_copy(update={"weights": weights, "kv_cache": None})
    quantized: Any = quantize_model(load_tiny(tiny_llama_dir), nearest, stored).model
    exact = calls_of(rotated_model(tiny_llama_dir, recipe))
    for index in range(3):
        layer = quantized.model.layers[index]
        for name, paths in LINEARS.items():
            x = exact[index, paths[0]][0]
            truth = torch.cat([exact[index, path][1] for path in paths], dim=2).double()
            with torch.inference_mode():
                windows = [torch.cat([layer.get_submodule(path)(rows) for path in paths], 1) for rows in x]
            errors = (torch.stack(windows).double() - truth).norm(dim=2)
            numbers = stored.numbers(index)[name]
            assert numbers["output_error"] == pytest.approx(float(errors.norm() / truth.norm()), rel=1e-2)
            of_tokens = (errors / truth.norm(dim=2)).median()
            assert numbers["token_error"] == pytest.approx(float(of_tokens), rel=3e-2)
            parts = numbers["activation_error"], numbers["weight_error"]
            assert all(part < numbers["output_error"] for part in parts) or recipe.activations.bits == 16
            # Errors of activations and of weights are nearly independent.
            assert numbers["output_error"] == pytest.approx(float(np.hypot(*parts)), rel=0.2)


def calls_of(model: Any) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
    """Input and output of every linear, ``[windows, tokens, channels]``, online rotations inside."""
    seen: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    for index, layer in enumerate(model.model.layers):
        for path in (path for paths in LINEARS.values() for path in paths):
            layer.get_submodule(path).register_forward_hook(
                lambda module, args, output, key=(index, path): seen.__setitem__(key, (args[0], output))
            )
    with torch.inference_mode():
        model(tiny_windows())
    return seen
