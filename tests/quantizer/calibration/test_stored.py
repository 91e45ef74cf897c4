"""Quantizing on a calibration folder: the codes are those of its Hessians; what does not fit is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from rrsq.errors import CalibrationError, NonFiniteError, UnsupportedArchitectureError
from rrsq.models import family_for
from rrsq.quantizer.calibration.basis import InputBasis
from rrsq.quantizer.calibration.fingerprint import ModelFingerprint, model_fingerprint
from rrsq.quantizer.calibration.manifest import MANIFEST_NAME, read_manifest
from rrsq.quantizer.calibration.stored import StoredCalibration, layer_file
from rrsq.quantizer.calibration.stream import HiddenStates, collect_inputs
from rrsq.quantizer.fold.rotations import fold_embedding, fold_head, fold_layer, untie_head
from rrsq.quantizer.observe import stored_statistics
from rrsq.quantizer.options import QuantizationOptions
from rrsq.quantizer.pipeline import quantize_model
from rrsq.quantizer.weights import quantize_weight
from rrsq.runtime.rotation.rotations import make_rotations
from rrsq.runtime.scheme import input_scheme
from tiny_calibration import calibrate_model, calibrate_tiny, tiny_windows
from tiny_families import tiny_model
from tiny_quantized import load_tiny, random_tokens, recipe_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["tiny_llama_dir", "tiny_qwen2_dir"])
def source(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def stored(source: Path, tmp_path_factory: pytest.TempPathFactory) -> StoredCalibration:
    return calibrate_tiny(source, tmp_path_factory.mktemp("calibration") / "calib", "rrs1-w4a4kv4")


@pytest.mark.parametrize("name", ["rrs1-w4a4kv4", "rrs-paper-w4a4kv4", "rtn-w4a4"])
def test_magnitudes_are_those_of_the_folders_recipe(source: Path, tmp_path: Path, name: str) -> None:
    recipe = recipe_of(name)
    ordered = recipe_of("rrs-paper-w4a4kv4").model_copy(update={"rotation": recipe.rotation})
    stored = calibrate_tiny(source, tmp_path / "calib", name, seed=3)
    assert stored.holds_magnitudes(recipe.rotation, 3)
    assert stored.holds_magnitudes(recipe.rotation, 4) == (recipe.rotation is None)
    model = load_tiny(source)
    family = family_for(model.config)
    sizes = family.sizes(model.config)
    rotations = make_rotations(recipe.rotation, sizes, seed=3)
    fold_embedding(model, family, rotations)
    hidden = HiddenStates(model, family, tiny_windows(), CPU)
    for index, layer in enumerate(model.model.layers):
        fold_layer(layer, family, rotations, sizes)
        found = stored_statistics(stored, index, layer, family.inputs, family, rotations, ordered, CPU)
        with collect_inputs(layer, family.inputs, CPU, with_hessian=False) as inputs:
            hidden.advance(layer)
        for path, measured in inputs.items():
            absmax = found.inputs[path].absmax
            assert absmax is not None
            torch.testing.assert_close(absmax, measured.absmax, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["rrs1-w4a4kv4", "rrs-paper-w4a4kv4", "gptq-w4a16"])
def test_codes_are_those_of_the_same_hessians(source: Path, stored: StoredCalibration, name: str) -> None:
    """A run on the folder, against rounding each folded weight directly."""
    recipe = recipe_of(name)
    quantized: Any = quantize_model(load_tiny(source), recipe, stored).model
    model = load_tiny(source)
    family = family_for(model.config)
    sizes = family.sizes(model.config)
    rotations = make_rotations(recipe.rotation, sizes, seed=0)
    for index, layer in enumerate(model.model.layers):
        fold_layer(layer, family, rotations, sizes)
        statistics = stored_statistics(stored, index, layer, family.inputs, family, rotations, recipe, CPU)
        for entry in family.inputs:
            parent = layer.get_submodule(entry.parent)
            weight = torch.cat([getattr(parent, linear).weight for linear in entry.linears])
            summary = statistics.inputs[entry.path]
            assert summary.hessian is not None
            hessian = summary.hessian.matrix()
            if input_scheme(recipe.activations, entry, weight.shape[1]).stores_order:
                assert summary.absmax is not None
                order = summary.absmax.argsort(stable=True)
                weight, hessian = weight[:, order], hessian[order][:, order]
            direct = quantize_weight(weight, recipe.weights, hessian)
            found = quantized.model.layers[index].get_submodule(entry.parent)
            rows = torch.cat([getattr(found, linear).dequantized_weight() for linear in entry.linears])
            multiplier = torch.ones(1) if direct.multiplier is None else direct.multiplier.float()
            steps = direct.scale[:, None] * multiplier
            expected = direct.codes * steps.repeat_interleave(weight.shape[1] // steps.shape[1], 1)
            torch.testing.assert_close(rows, expected, rtol=1e-6, atol=1e-7)


def test_a_quantized_head_is_that_of_the_stored_hessian(source: Path, stored: StoredCalibration) -> None:
    recipe = recipe_of("rrs1-w4a4kv4", ["head.bits=4"])
    quantized: Any = quantize_model(load_tiny(source), recipe, stored)
    assert quantized.report.fallbacks == []
    model = load_tiny(source)
    family = family_for(model.config)
    rotations = make_rotations(recipe.rotation, family.sizes(model.config), seed=0)
    untie_head(model, family)
    fold_head(model, family, rotations)
    hessian = stored.head_hessian(InputBasis.of_head(rotations, None), device=CPU)
    direct = quantize_weight(model.lm_head.weight.detach(), recipe.weights, hessian)
    assert direct.multiplier is not None
    steps = (direct.scale[:, None] * direct.multiplier).repeat_interleave(32, 1)
    torch.testing.assert_close(quantized.model.lm_head.dequantized_weight(), direct.codes * steps)


def test_a_run_without_text_reports_what_it_can(source: Path, stored: StoredCalibration) -> None:
    report = quantize_model(load_tiny(source), recipe_of("rrs-w4a4kv4"), stored).report
    for layer in report.layers:
        assert layer.output_snr_db is None
        assert layer.cache_error is None
        assert list(layer.weight_snr_db) == ["self_attn.qkv", "self_attn.o", "mlp.gate_up", "mlp.down"]


def test_another_model_is_refused_with_what_differs(source: Path, stored: StoredCalibration) -> None:
    model = load_tiny(source)
    stored.check_model(model_fingerprint(model), "it")
    with torch.no_grad():
        model.model.norm.weight[3] += 1
    other = model_fingerprint(model)
    with pytest.raises(CalibrationError, match="differ in their weights") as caught:
        stored.check_model(other, "it")
    assert caught.value.exit_code == 2
    with pytest.raises(CalibrationError, match=f"'{source.name}' and 'it' differ in their configurations"):
        stored.check_model(ModelFingerprint("0", other.weights), "it")


@pytest.fixture
def copied(stored: StoredCalibration, tmp_path: Path) -> Path:
    return shutil.copytree(stored.folder, tmp_path / "copied")


def refused(source: Path, folder: Path, recipe: str, overrides: tuple[str, ...] = (), seed: int = 0) -> str:
    with pytest.raises(CalibrationError) as caught:
        quantize_model(
            load_tiny(source),
            recipe_of(recipe, overrides),
            StoredCalibration(folder),
            QuantizationOptions(seed),
        )
    return str(caught.value)


def test_an_order_of_other_rotations_is_refused(source: Path, stored: StoredCalibration) -> None:
    message = refused(source, stored.folder, "rrs-paper-w4a4kv4", seed=3)
    assert "seed 0" in message
    assert "--recipe rrs-paper-w4a4kv4 --seed 3" in message
    message = refused(source, stored.folder, "rrs-paper-w4a4kv4", ("rotation.head=false",))
    assert "head=False" in message


def test_a_recipe_that_needs_text_is_refused(source: Path, stored: StoredCalibration) -> None:
    message = refused(source, stored.folder, "rrs-w4a4kv4", ("kv_cache.sensitive_layers=1",))
    assert "Leave out --calibration" in message


def test_gptq_without_hessians_is_refused_and_the_rest_is_not(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "calib"
    stored = calibrate_tiny(source, folder, hessians=False)
    assert "--no-hessians" in refused(source, folder, "rrs-w4a4kv4")
    quantize_model(load_tiny(source), recipe_of("rrs-w4a4kv4", ["weights.method=rtn"]), stored)


def test_a_layer_that_was_not_copied_is_named(copied: Path) -> None:
    layer_file(copied, 1).unlink()
    with pytest.raises(CalibrationError, match=r"lacks layer-0001\.safetensors"):
        StoredCalibration(copied)


def test_a_truncated_layer_is_named(source: Path, copied: Path) -> None:
    path = layer_file(copied, 1)
    path.write_bytes(path.read_bytes()[:-100])
    assert "layer-0001.safetensors is damaged" in refused(source, copied, "rrs-w4a4kv4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace('"format_version":2', '"format_version":3'), "format version 3"),
        (lambda text: text.replace('"seed"', '"sed"'), "not valid at '(seed|sed)'"),
        (lambda text: text[:50], "is damaged"),
        (lambda text: "[]", "is damaged"),
    ],
)
def test_a_manifest_that_is_not_understood(copied: Path, change: Any, message: str) -> None:
    path = copied / MANIFEST_NAME
    path.write_text(change(path.read_text().replace('": ', '":')))
    with pytest.raises(CalibrationError, match=message):
        read_manifest(copied)


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="is no calibration folder"):
        StoredCalibration(tmp_path)


def test_activations_that_overflow_are_named(tiny_llama_dir: Path, tmp_path: Path) -> None:
    model = load_tiny(tiny_llama_dir)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1e38)
    with pytest.raises(NonFiniteError, match="Layer 1, input 'down'"):
        calibrate_model(model, "tiny", tmp_path / "calib", windows=random_tokens(1, 8))


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_mixtures_of_experts_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedArchitectureError, match="does not cover mixtures of experts"):
        calibrate_model(tiny_model(name), name, tmp_path / "calib")
