"""What cannot be served is refused with the reason and what to do; vLLM is not needed to say so."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from servable import SERVABLE, llama
from transformers import Starcoder2Config

from rrsq.errors import UsageError
from rrsq.models import families, family_for
from rrsq.recipe import Recipe
from rrsq.runtime.format.format import CheckpointInfo, RotationInfo
from rrsq.runtime.rotation.rotations import make_rotations
from rrsq.vllm.limits import check_servable
from tiny_quantized import recipe_of


def info_of(config: Any, recipe: Recipe) -> CheckpointInfo:
    """What a checkpoint of a model says of itself."""
    family = family_for(config)
    rotations = make_rotations(recipe.rotation, family.sizes(config), 0, folds_residual=family.folds_residual)
    return CheckpointInfo(recipe=recipe, rotation=RotationInfo.model_validate(rotations.describe()))


def check(overrides: list[str], ranks: int = 1, config: Any = None, recipe: str = "rrs1-w4a4kv4") -> None:
    config = llama() if config is None else config
    check_servable(config, info_of(config, recipe_of(recipe, overrides)), ranks)


def smoothing(**fields: str) -> str:
    text = ", ".join(f"{name}: {value}" for name, value in fields.items())
    return f"activations={{bits: 4, smoothing: {{scales: real, {text}}}}}"


@pytest.mark.parametrize("scope", ["sequence", "block"])
def test_scales_shared_by_tokens(scope: str) -> None:
    with pytest.raises(UsageError, match=f"share scales over a {scope}.*scope: token"):
        check([smoothing(scope=scope)])


def test_a_family_that_was_not_tried() -> None:
    with pytest.raises(UsageError, match="Starcoder2ForCausalLM have not been shown"):
        check([], config=Starcoder2Config())


def test_all_other_families_are_tried() -> None:
    served = {family.model_type for family in families() if family.served}
    assert served == {*SERVABLE, "gemma3"}


def test_the_published_recipe() -> None:
    with pytest.raises(UsageError, match="scope: token"):
        check([], recipe="rrs-paper-w4a4kv4")


def test_a_scope_in_an_override() -> None:
    activations = "{bits: 4, smoothing: {scope: sequence, scales: real}}"
    with pytest.raises(UsageError, match="share scales over a sequence"):
        check([f"overrides=[{{match: '*.down', activations: {activations}}}]"])


def test_channels_sorted_in_each_call() -> None:
    with pytest.raises(UsageError, match="channel_order: none"):
        check([smoothing(channel_order="per_call")])


def test_a_stored_order_binds_processes() -> None:
    ordered = smoothing(channel_order="calibrated")
    check([ordered])
    with pytest.raises(UsageError, match=r"of 'o .*' are in a stored order.*--tensor-parallel-size 1"):
        check([ordered, "rotation=null"], ranks=2)
    unsplit = smoothing(channel_order="calibrated", inputs="[qkv, gate_up]")
    check([unsplit, "rotation=null"], ranks=2)


def test_a_rotation_binds_processes() -> None:
    check([])
    with pytest.raises(UsageError, match=r"of 'o .*' mixes 96 channels.*2 processes have 48.*shards=2"):
        check([], ranks=2)
    with pytest.raises(UsageError, match=r"of 'down .*' mixes 96 channels.*rotation\.shards=4"):
        check(["rotation.across_heads=false"], ranks=4)
    check(["rotation.shards=4"], ranks=4)
    check(["rotation.shards=4"], ranks=2)
    check(["rotation.across_heads=false", "rotation.intermediate=false"], ranks=8)


def test_every_size_of_a_mixture_counts() -> None:
    config = SERVABLE["qwen2_moe"]()
    check(["rotation.shards=2"], ranks=2, config=config)
    with pytest.raises(UsageError, match=r"of 'down \(40 channels\)' mixes 40"):
        check(["rotation.across_heads=false"], ranks=2, config=config)


def test_experts_in_part() -> None:
    kept = "overrides=[{match: '*.experts.down', weights: {bits: 16}, activations: {bits: 16}}]"
    with pytest.raises(UsageError, match=r"experts of 'model\.layers\.0'.*all of them or none"):
        check([kept], config=SERVABLE["mixtral"]())
    check(["modules_to_not_convert=['*.experts.*']"], config=SERVABLE["mixtral"]())


def test_blocks_that_no_process_boundary_cuts() -> None:
    check([], ranks=2, recipe="rrs-w4a4kv4")
    with pytest.raises(
        UsageError, match=r"mixes 8 channels, of which 2 .* 20 each.*smaller rotation\.blocks"
    ):
        check([], ranks=2, config=SERVABLE["qwen2_moe"](), recipe="rrs-w4a4kv4")


def test_it_needs_neither_vllm_nor_the_quantizer() -> None:
    program = (
        "import sys, rrsq.vllm, rrsq.vllm.limits, rrsq.vllm.places;"
        "print([name for name in sys.modules if name.startswith(('vllm.', 'rrsq.quantizer'))])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
