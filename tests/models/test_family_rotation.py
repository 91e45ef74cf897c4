"""Every rotation, alone and with the others, leaves the logits of every family what they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rrsq.errors import UnsupportedArchitectureError
from rrsq.models import family_for
from rrsq.models.opt import OPT
from rrsq.quantizer.fold.rotations import rotate_model
from rrsq.recipe import Rotation
from rrsq.runtime.modules.rotation import RotatedLinear
from rrsq.runtime.rotation.rotations import Rotations, make_rotations
from tiny_families import TINY, random_model, tiny_model
from tiny_quantized import logits_of, random_tokens

NONE = Rotation(residual=False, head=False, across_heads=False, intermediate=False)
ROTATIONS = {
    "residual": NONE.model_copy(update={"residual": True}),
    "head": NONE.model_copy(update={"head": True}),
    "across_heads": NONE.model_copy(update={"across_heads": True}),
    "intermediate": NONE.model_copy(update={"intermediate": True}),
    "all": Rotation(),
}


@pytest.mark.parametrize("recipe", ROTATIONS.values(), ids=ROTATIONS)
@pytest.mark.parametrize("name", TINY)
def test_the_logits_do_not_change(name: str, recipe: Rotation) -> None:
    model = tiny_model(name)
    family = family_for(model.config)
    tokens = random_tokens(2, 21)
    before = logits_of(model, tokens).double()
    weights = {path: weight.clone() for path, weight in model.state_dict().items()}
    sizes = family.sizes(model.config)
    rotations = make_rotations(recipe, sizes, 0, folds_residual=family.folds_residual)
    rotate_model(model, family, rotations, sizes)
    after = logits_of(model, tokens).double()
    assert float((after - before).norm() / before.norm()) < 1e-5
    state = {path.replace(".linear.", "."): weight for path, weight in model.state_dict().items()}
    changed = {path for path in weights if path not in state or not torch.equal(state[path], weights[path])}
    # Five heads (OPT's here) have no Hadamard matrix of that order.
    assert bool(changed) == any(value is not None for value in rotations.describe().values())
    assert bool(changed) or (name, recipe) == ("opt", ROTATIONS["across_heads"])


@pytest.mark.parametrize("name", TINY)
def test_inputs_are_rotated_online_where_the_residual_stream_cannot_be(name: str) -> None:
    model = tiny_model(name)
    family = family_for(model.config)
    sizes = family.sizes(model.config)
    rotations = make_rotations(ROTATIONS["residual"], sizes, 0, folds_residual=family.folds_residual)
    after_norms = name in ("gemma2", "gemma3", "gemma3_text", "olmo2", "olmo3", "exaone4")
    assert (rotations.residual is None) == (rotations.residual_online is not None) == after_norms
    rotate_model(model, family, rotations, sizes)
    for layer in model.get_submodule(family.layers):
        for entry in family.inputs_in(layer):
            for path in entry.linear_paths:
                online = isinstance(layer.get_submodule(path), RotatedLinear)
                assert online == (after_norms and entry.name in ("qkv", "gate_up"))


@pytest.mark.parametrize("name", ["gemma2", "olmo2"])
def test_folding_past_a_norm_is_refused(name: str) -> None:
    model = tiny_model(name)
    family = family_for(model.config)
    sizes = family.sizes(model.config)
    folded = make_rotations(Rotation(), sizes, 0)
    with pytest.raises(ValueError, match=f"R1 cannot be folded into {name}"):
        rotate_model(model, family, Rotations(residual=folded.residual), sizes)


def opt(**options: int) -> Any:
    config = TINY["opt"]()
    for key, value in options.items():
        setattr(config, key, value)
    return random_model(config)


@pytest.mark.parametrize("recipe", [ROTATIONS["across_heads"], ROTATIONS["all"]], ids=["alone", "all"])
def test_a_number_of_heads_that_has_a_matrix(recipe: Rotation) -> None:
    """The tiny OPT has five heads; with four, its output projection with a bias is rotated online."""
    model = opt(num_attention_heads=4)
    tokens = random_tokens(2, 21)
    before = logits_of(model, tokens).double()
    sizes = OPT.sizes(model.config)
    rotations = make_rotations(recipe, sizes, 0)
    assert rotations.across_heads is not None
    rotate_model(model, OPT, rotations, sizes)
    assert isinstance(model.model.decoder.layers[0].self_attn.out_proj, RotatedLinear)
    after = logits_of(model, tokens).double()
    assert float((after - before).norm() / before.norm()) < 1e-5


def test_norms_without_parameters_need_no_biases_behind_them() -> None:
    """As Galactica has them: LayerNorm without gain and bias, and linears without biases."""
    model = opt(enable_bias=False, layer_norm_elementwise_affine=False)
    tokens = random_tokens(2, 12)
    before = logits_of(model, tokens).double()
    sizes = OPT.sizes(model.config)
    rotate_model(model, OPT, make_rotations(Rotation(), sizes, 0), sizes)
    after = logits_of(model, tokens).double()
    assert float((after - before).norm() / before.norm()) < 1e-5
    assert model.lm_head.bias is None


def test_a_bias_of_a_norm_that_no_linear_can_take_up_is_refused() -> None:
    sizes = OPT.sizes(TINY["opt"]())
    with pytest.raises(UnsupportedArchitectureError, match=r"rotation\.residual=false"):
        rotate_model(opt(enable_bias=False), OPT, make_rotations(Rotation(), sizes, 0), sizes)
    model = opt(enable_bias=False)
    tokens = random_tokens(2, 12)
    before = logits_of(model, tokens).double()
    rotate_model(model, OPT, make_rotations(Rotation(residual=False), sizes, 0), sizes)
    after = logits_of(model, tokens).double()
    assert float((after - before).norm() / before.norm()) < 1e-5
