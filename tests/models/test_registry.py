"""Families and the sizes read off a configuration."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import transformers
from transformers import (
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    SmolLM3Config,
)

from rrsq.errors import UnsupportedArchitectureError
from rrsq.models import ModelFamily, ModelSizes, families, family_for, register_family, registry
from rrsq.models.llama import LLAMA_INPUTS


def test_llama_and_qwen2_are_known() -> None:
    assert {"llama", "qwen2"} <= {family.model_type for family in families()}
    assert family_for(LlamaConfig()).architecture == "LlamaForCausalLM"
    assert family_for(Qwen2Config()).architecture == "Qwen2ForCausalLM"


@pytest.mark.parametrize("config", [GPT2Config(), SimpleNamespace(), SimpleNamespace(model_type="mamba")])
def test_an_unsupported_architecture_lists_the_supported(config: object) -> None:
    with pytest.raises(UnsupportedArchitectureError, match="is not supported") as caught:
        family_for(config)
    assert all(family.model_type in str(caught.value) for family in families())
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (OPTConfig(word_embed_proj_dim=512, hidden_size=1024), "embedding is projected"),
        (OPTConfig(do_layer_norm_before=False), "do_layer_norm_before"),
        (OPTConfig(_remove_final_layer_norm=True), "norms do not stand before"),
        (GemmaConfig(use_bidirectional_attention=True), "bidirectional"),
        (Gemma2Config(use_bidirectional_attention=True), "bidirectional"),
        (Gemma3TextConfig(use_bidirectional_attention=True), "bidirectional"),
    ],
)
def test_a_configuration_that_a_family_does_not_cover_is_refused(config: object, reason: str) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=reason):
        family_for(config)


def test_every_family_names_a_class_of_transformers_and_an_input_of_each_kind() -> None:
    for family in families():
        assert getattr(transformers, family.architecture).config_class.model_type == family.model_type
        assert {entry.name for entry in family.inputs} == {"qkv", "o", "gate_up", "down"}
        assert len({entry.path for entry in family.inputs}) == len(family.inputs)


def test_a_family_can_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    config = MistralConfig(sliding_window=None)
    added = register_family(ModelFamily("mistral", "MistralForCausalLM", LLAMA_INPUTS))
    assert family_for(config) is added
    assert added in families()


def test_sizes_do_not_assume_that_heads_fill_the_hidden_size() -> None:
    config = LlamaConfig(
        hidden_size=96, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2, head_dim=16
    )
    sizes = ModelSizes.from_config(config)
    assert (sizes.heads, sizes.kv_heads, sizes.head_dim) == (4, 2, 16)
    assert (sizes.hidden, sizes.intermediate) == (96, 160)


@pytest.mark.parametrize(
    ("config", "model"),
    [
        (GemmaConfig(), "Gemma-7B"),
        (Gemma2Config(), "Gemma-2-2B"),
        (LlamaConfig(), "Llama-2-7B"),
        (MistralConfig(), "Mistral-7B"),
        (MixtralConfig(), "Mixtral-8x7B"),
        (OPTConfig(), "OPT-125m"),
        (Olmo2Config(), "OLMo-2-7B"),
        (Phi3Config(), "Phi-3-mini"),
        (Qwen2MoeConfig(), "Qwen1.5-MoE-A2.7B"),
    ],
)
def test_public_sizes_are_those_that_transformers_has_as_defaults(
    config: PretrainedConfig, model: str
) -> None:
    family = family_for(config)
    assert family.public[model] == family.sizes(config)


def test_sizes_without_head_dim_in_the_configuration() -> None:
    config = Qwen2Config(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
    sizes = ModelSizes.from_config(config)
    assert (sizes.head_dim, sizes.kv_heads) == (16, 2)


def test_inputs_are_found_by_name_and_cover_every_linear() -> None:
    family = family_for(LlamaConfig())
    assert [family.input(name).name for name in ("qkv", "o", "gate_up", "down")] == [
        entry.name for entry in family.inputs
    ]
    linears = [name for entry in family.inputs for name in entry.linears]
    assert len(linears) == len(set(linears)) == 7


def test_layers_without_rope_are_read_off_the_configuration() -> None:
    layers = range(4)
    hybrid = Exaone4Config(num_hidden_layers=4)
    plain = Exaone4Config(num_hidden_layers=4, sliding_window=None, layer_types=["full_attention"] * 4)
    smollm3 = SmolLM3Config(num_hidden_layers=4, no_rope_layer_interval=2)
    rotates = {
        name: [family_for(config).rotates_keys(config, index) for index in layers]
        for name, config in (("hybrid", hybrid), ("plain", plain), ("smollm3", smollm3))
    }
    assert rotates["hybrid"] == [True, True, True, False]
    assert rotates["plain"] == [True] * 4
    assert rotates["smollm3"] == [True, False, True, False]
