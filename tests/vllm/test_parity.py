"""What vLLM's model computes from a checkpoint is what transformers computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fake_vllm import REASON, has_vllm, serve
from servable import SERVABLE, llama

import rrsq
from tiny_families import TINY
from tiny_quantized import logits_of, random_tokens

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from conftest import Make

pytestmark = pytest.mark.skipif(not has_vllm(), reason=REASON)

TOKENS = random_tokens(23, seed=9).clamp_max(500)  # The last ones stand for images.
FULL_CACHE = "kv_cache=null"  # vLLM keeps it in 16 bits, whatever the recipe says.
FLOAT = ("activations={bits: 16}", FULL_CACHE)


def difference(folder: Path, ranks: int = 1) -> Tensor:
    """Logits of vLLM's model less those of transformers', relative to the latter's spread."""
    expected = logits_of(rrsq.load(str(folder), device="cpu"), TOKENS.unsqueeze(0))[0]
    return (serve(folder, ranks).logits(TOKENS) - expected) / expected.std()


@pytest.mark.parametrize("name", SERVABLE)
def test_every_family(name: str, make: Make) -> None:
    folder = make(name, SERVABLE[name](), FLOAT)
    assert difference(folder).abs().max() < 1e-4


def test_the_language_model_of_one_that_sees(make: Make) -> None:
    assert difference(make("gemma3", TINY["gemma3"](), FLOAT)).abs().max() < 1e-4


@pytest.mark.parametrize("name", SERVABLE)
def test_every_family_with_4_bit_activations(name: str, make: Make) -> None:
    folder = make(name, SERVABLE[name](), [FULL_CACHE])
    # An activation between two codes may fall either way by the order of a sum; then a token departs.
    departing = (difference(folder).abs().amax(-1) > 1e-3).float().mean()
    assert departing <= 0.1


RECIPES = {
    "8-bit activations": ["activations={bits: 8}"],
    "8-bit head": ["head={bits: 8}"],
    "4-bit head": ["head={bits: 4}"],
    "some of fused linears in 16 bits": ["modules_to_not_convert=['*.v_proj', '*.up_proj']"],
    "others of them": ["modules_to_not_convert=['*.q_proj', '*.0.*.gate_proj']"],
    "16 bits behind online rotations": ["modules_to_not_convert=['*.o_proj', '*.down_proj']"],
    "one layer in 16 bits": ["modules_to_not_convert=['model.layers.0.*']"],
    "overrides": [
        "overrides=[{match: '*.down', activations: {bits: 8}}, {match: '*.o', activations: {bits: 16}},"
        " {match: '*.1.*gate_up', weights: {bits: 16}, activations: {bits: 16}}]"
    ],
    "no rotation": ["rotation=null"],
    "no smoothing": ["activations={bits: 4}"],
    "smoothed in part": ["activations={bits: 4, smoothing: {inputs: [o, gate_up]}}"],
    "real scales": ["activations={bits: 4, smoothing: {scales: real, group_size: 8}}"],
    "real scales of normed tokens": [
        "activations={bits: 4, smoothing: {scales: real, group_size: 8, statistic: token_normalized_max}}"
    ],
    "channels in a stored order": [
        "activations={bits: 4, smoothing: {scales: real, group_size: 8, channel_order: calibrated}}"
    ],
    "one scale a row": ["weights={group_size: null}"],
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_kind_of_recipe(name: str, make: Make) -> None:
    folder = make("llama", llama(), [*RECIPES[name], FULL_CACHE])
    departing = (difference(folder).abs().amax(-1) > 1e-3).float().mean()
    assert departing <= 0.1


@pytest.mark.parametrize("recipe", ["gptq-w4a16", "rtn-w4a4", "quarot-w4a4kv4", "w16a16kv4"])
def test_other_named_recipes(recipe: str, make: Make) -> None:
    folder = make("llama", llama(), [FULL_CACHE], recipe)
    departing = (difference(folder).abs().amax(-1) > 1e-3).float().mean()
    assert departing <= 0.1


def test_a_residual_stream_that_is_rotated_online_with_linears_in_16_bits(make: Make) -> None:
    kept = "modules_to_not_convert=['*.k_proj', '*.0.*.up_proj', '*.down_proj']"
    folder = make("gemma2", SERVABLE["gemma2"](), [kept, *FLOAT])
    assert difference(folder).abs().max() < 1e-4


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", SERVABLE)
def test_processes_share_every_family(name: str, ranks: int, make: Make) -> None:
    folder = make(name, SERVABLE[name](), [f"rotation.shards={ranks}", *FLOAT])
    assert difference(folder, ranks).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text", "olmo2"])
def test_processes_share_what_was_not_made_for_them(name: str, make: Make) -> None:
    """Rotations in blocks of 16 cross no shard of 48 channels."""
    folder = make(name, SERVABLE[name](), FLOAT)
    assert difference(folder, 2).abs().max() < 1e-4


SHARED = {
    "8-bit head": ["head={bits: 8}"],
    "4-bit head": ["head={bits: 4}"],
    "some of fused linears in 16 bits": ["modules_to_not_convert=['*.k_proj', '*.up_proj']"],
    "16 bits behind online rotations": ["modules_to_not_convert=['*.o_proj', '*.down_proj']"],
    "groups of 16": ["weights.group_size=16"],
    "one scale a row": ["weights={group_size: null}"],
}


@pytest.mark.parametrize("name", SHARED)
def test_processes_share_what_recipes_leave_out(name: str, make: Make) -> None:
    folder = make("llama", llama(), [*SHARED[name], "rotation.shards=4", *FLOAT])
    assert difference(folder, 4).abs().max() < 1e-4


def test_16_bit_linears_do_not_bind_processes(make: Make) -> None:
    """Their rotation is taken back, so that it may mix the channels of different processes."""
    folder = make("llama", llama(), ["modules_to_not_convert=['*.o_proj', '*.down_proj']", *FLOAT])
    assert difference(folder, 4).abs().max() < 1e-4


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", SERVABLE)
def test_embeddings_of_every_family(name: str, bits: int, ranks: int, make: Make) -> None:
    """Tied heads share the codes, others do not; rows are those of one process."""
    overrides = [f"embedding.bits={bits}", f"rotation.shards={ranks}", *FLOAT]
    folder = make(name, SERVABLE[name](), overrides)
    assert difference(folder, ranks).abs().max() < 1e-4


@pytest.mark.parametrize(
    "overrides",
    [
        ["embedding={bits: 4, group_size: null}"],
        ["embedding.bits=8", "head.bits=8"],
        ["embedding.bits=4", "head.bits=8"],
        ["embedding.bits=8", "head.bits=4"],
        ["embedding.bits=8", "modules_to_not_convert=[lm_head]"],
    ],
)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "granite"])
def test_embeddings_beside_heads_of_their_own(name: str, overrides: list[str], make: Make) -> None:
    folder = make(name, SERVABLE[name](), [*overrides, *FLOAT])
    assert difference(folder, 2).abs().max() < 1e-4
