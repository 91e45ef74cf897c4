"""Stored statistics of every dense family against hooks on the unmodified model, and on the rotated one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rrsq.models import family_for
from rrsq.quantizer.calibration.basis import InputBasis, affine_of_head
from rrsq.quantizer.calibration.stored import StoredCalibration
from rrsq.quantizer.calibration.stream import HiddenStates
from rrsq.quantizer.calibration.triangle import unpack_symmetric
from rrsq.quantizer.fold.rotations import fold_embedding, fold_head, fold_layer, untie_head
from rrsq.quantizer.head import head_hessian
from rrsq.quantizer.observe import measure_layer, stored_statistics
from rrsq.recipe import Rotation
from rrsq.runtime.assemble import key_rotary
from rrsq.runtime.rotation.rotations import Rotations, make_rotations
from tiny_calibration import calibrate_model, tiny_windows
from tiny_families import TINY, tiny_model
from tiny_quantized import recipe_of

CPU = torch.device("cpu")
DENSE = [name for name in TINY if not name.endswith(("mixtral", "moe"))]
WITHOUT_ROTATION = recipe_of("gptq-w4a16", ["head.bits=4"])


@pytest.fixture(scope="module", params=DENSE)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def stored(name: str, tmp_path_factory: pytest.TempPathFactory) -> StoredCalibration:
    return calibrate_model(tiny_model(name), name, tmp_path_factory.mktemp("calibration") / "calib")


def inputs_of_the_original(name: str) -> dict[tuple[int, str], np.ndarray]:
    """What every linear of the unmodified model reads, float64 ``[tokens, channels]``, from hooks."""
    model = tiny_model(name).double()
    family = family_for(model.config)
    seen: dict[tuple[int, str], np.ndarray] = {}

    def hook(key: tuple[int, str]) -> Any:
        def keep(module: Any, args: tuple[Tensor, ...]) -> None:
            seen[key] = args[0].reshape(-1, args[0].shape[-1]).numpy()

        return keep

    for index, layer in enumerate(model.get_submodule(family.layers)):
        for entry in family.inputs:
            layer.get_submodule(entry.linear_paths[0]).register_forward_pre_hook(hook((index, entry.path)))
    model.get_submodule(family.head).register_forward_pre_hook(hook((-1, "head")))
    with torch.inference_mode():
        model(tiny_windows())
    return seen


def close(found: Tensor | None, expected: np.ndarray) -> bool:
    assert found is not None
    return float(np.linalg.norm(found.numpy() - expected)) < 1e-4 * float(np.linalg.norm(expected))


def test_without_rotation_they_are_those_of_the_model(name: str, stored: StoredCalibration) -> None:
    model = tiny_model(name)
    family = family_for(model.config)
    seen = inputs_of_the_original(name)
    for index, layer in enumerate(model.get_submodule(family.layers)):
        found = stored_statistics(
            stored, index, layer, family.inputs, family, Rotations(), WITHOUT_ROTATION, CPU
        )
        assert found.inputs.keys() == {entry.path for entry in family.inputs}
        for path, summary in found.inputs.items():
            x = seen[index, path]
            assert summary.hessian is not None
            assert close(summary.hessian.matrix(), x.T @ x), path
    basis = InputBasis.of_head(Rotations(), affine_of_head(model, family))
    x = seen[-1, "head"]
    assert close(stored.head_hessian(basis, device=CPU), x.T @ x)


@pytest.mark.parametrize("family_name", ["llama", "qwen2"])
def test_what_a_file_holds_is_before_the_gain(
    family_name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("file") / "calib"
    stored = calibrate_model(tiny_model(family_name), family_name, folder)
    layers = tiny_model(family_name).double().model.layers
    norms = {"self_attn.qkv": "input_layernorm", "mlp.gate_up": "post_attention_layernorm"}
    for (index, path), x in inputs_of_the_original(family_name).items():
        if index < 0:
            continue
        if path in norms:
            x = x / layers[index].get_submodule(norms[path]).weight.detach().numpy()
        prefix = path.rsplit(".", 1)[-1]
        assert close(unpack_symmetric(stored.tensor(index, f"{prefix}.hessian"), x.shape[1]), x.T @ x)
        assert close(stored.tensor(index, f"{prefix}.rms"), np.sqrt((x**2).mean(0)))
        np.testing.assert_allclose(stored.tensor(index, f"{prefix}.mean").numpy(), x.mean(0), atol=1e-4)


ROTATIONS = {
    "all": Rotation(),
    "no residual": Rotation(residual=False, shards=2),
    "residual alone": Rotation(head=False, across_heads=False, intermediate=False),
    "head alone": Rotation(residual=False, across_heads=False, intermediate=False),
}


@pytest.mark.parametrize("rotation", ROTATIONS.values(), ids=ROTATIONS)
def test_rotated_they_are_those_of_the_rotated_model(
    name: str, stored: StoredCalibration, rotation: Rotation
) -> None:
    """Each layer is rotated and measured by the code of an ordinary quantization, quantizing nothing."""
    model = tiny_model(name)
    family = family_for(model.config)
    sizes = family.sizes(model.config)
    recipe = recipe_of("gptq-w4a16").model_copy(update={"rotation": rotation})
    rotations = make_rotations(rotation, sizes, seed=5, folds_residual=family.folds_residual)
    if rotations.residual is not None:
        untie_head(model, family)
    fold_embedding(model, family, rotations)
    hidden = HiddenStates(model, family, tiny_windows(), CPU)
    for index, layer in enumerate(model.get_submodule(family.layers)):
        fold_layer(layer, family, rotations, sizes)
        attention, rotary = layer.get_submodule(family.attention), key_rotary(model, family, index)
        measured = measure_layer(
            layer, family.inputs, attention, rotary, hidden, recipe, CPU, lambda: None
        ).statistics
        found = stored_statistics(stored, index, layer, family.inputs, family, rotations, recipe, CPU)
        for path, summary in measured.inputs.items():
            assert summary.hessian is not None
            of_folder = found.inputs[path].hessian
            assert of_folder is not None
            assert close(of_folder.matrix(), summary.hessian.matrix().double().numpy()), path
        for which, mean in measured.means.items():
            torch.testing.assert_close(found.means[which], mean, rtol=1e-3, atol=1e-4)
        hidden.advance(layer)
    fold_head(model, family, rotations)
    expected = head_hessian(model, family, hidden, CPU)
    assert expected is not None
    basis = InputBasis.of_head(rotations, affine_of_head(model, family))
    assert close(stored.head_hessian(basis, device=CPU), expected.double().numpy())
