"""Norms and gates quantize where one linear alone reads what they compute, and nowhere else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from fake_vllm import REASON, has_vllm, serve
from servable import SERVABLE, llama
from torch import Tensor, nn

from tiny_quantized import random_tokens

if TYPE_CHECKING:
    from pathlib import Path

    from fake_vllm import Served

    from conftest import Make

pytestmark = pytest.mark.skipif(not has_vllm(), reason=REASON)

TOKENS = random_tokens(23, seed=9).clamp_max(500)
FULL_CACHE = "kv_cache=null"
QKV, GATE_UP, DOWN = "input_layernorm", "post_attention_layernorm", "mlp.act_fn"
ALL = {QKV, GATE_UP, DOWN}
FUSED = {
    "llama": ALL,
    "mistral": ALL,
    "qwen2": ALL,
    "qwen3": ALL,
    "gemma": ALL,
    "gemma2": {QKV, "pre_feedforward_layernorm", DOWN},  # Rotated online.
    "gemma3_text": {QKV, "pre_feedforward_layernorm", DOWN},
    "granite": ALL,  # Its layers add by themselves.
    "arcee": {QKV, GATE_UP},  # No gates.
    "mixtral": {QKV},  # A router reads what experts read.
    "olmo2": set(),  # transformers' own layers.
    "opt": set(),  # Norms and an activation that no kernel knows.
}


def fused(served: Served, layer: int = 0) -> set[str]:
    """Modules of a layer that quantize."""
    model = served.models[0].model
    modules = getattr(model, "decoder", model).layers[layer].named_modules(remove_duplicate=False)
    return {name for name, module in modules if "Forward" in type(module.__dict__.get("forward")).__name__}


def serve_apart(folder: Path, monkeypatch: pytest.MonkeyPatch, ranks: int = 1) -> Served:
    """The same in vLLM's way."""
    with monkeypatch.context() as patch:
        patch.setattr("rrsq.vllm.models.fuse", lambda *_: None)
        served = serve(folder, ranks)
    assert not fused(served)
    return served


@pytest.mark.parametrize("name", FUSED)
def test_it_computes_what_separate_kernels_do(name: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(name, SERVABLE[name](), [FULL_CACHE])
    served = serve(folder)
    assert [fused(served, layer) for layer in (0, 1)] == [FUSED[name]] * 2
    expected = serve_apart(folder, monkeypatch).logits(TOKENS)
    torch.testing.assert_close(served.logits(TOKENS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("ranks", "overrides"), [(2, []), (4, ["rotation=null"])])
def test_processes_quantize_their_parts(
    ranks: int, overrides: list[str], make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make("llama", llama(), [*overrides, FULL_CACHE])
    served = serve(folder, ranks)
    assert fused(served) == ALL
    expected = serve_apart(folder, monkeypatch, ranks).logits(TOKENS)
    torch.testing.assert_close(served.logits(TOKENS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("llama", False),
        ("llama", True),
        ("mistral", False),
        ("qwen2", False),
        ("qwen3", False),
        ("gemma3_text", False),
        ("gemma3_text", True),
    ],
)
def test_the_ops_of_a_layer(name: str, first: bool, make: Make) -> None:
    """In one graph, of a residual stream that begins here or goes on."""
    layer = serve(make(name, SERVABLE[name](), [FULL_CACHE])).models[0].model.layers[1]
    layer.self_attn.attn.forward = lambda query, key, value: query
    found: Counter[str] = Counter()

    def note(graph: Any, inputs: Any) -> Any:
        targets = [str(node.target) for node in graph.graph.nodes]
        found.update(target.split(".")[1] for target in targets if target.startswith("rrsq."))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(layer.__call__, fullgraph=True, dynamic=True, backend=note)
    generator = torch.Generator().manual_seed(1)
    arguments = torch.arange(9), torch.randn(9, 64, generator=generator)
    residual = None if first else torch.randn(9, 64, generator=generator)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(*arguments, residual), layer(*arguments, residual))
    expected = {"add_rms_norm_quantize": 2, "gated_quantize": 1, "quantize_signed": 1, "linear_int8": 4}
    if first:
        expected |= {"add_rms_norm_quantize": 1, "rms_norm_quantize": 1}
    assert found == expected


def test_the_ops_say_the_shapes_of_their_results(make: Make) -> None:
    layer = serve(make("llama", llama(), [FULL_CACHE])).models[0].model.layers[1]
    layer.self_attn.attn.forward = lambda query, key, value: query
    torch._dynamo.reset()
    compiled = torch.compile(layer.__call__, fullgraph=True, dynamic=True, backend="aot_eager")
    generator = torch.Generator().manual_seed(1)
    x, residual = (torch.randn(9, 64, generator=generator) for _ in range(2))
    with torch.inference_mode():
        torch.testing.assert_close(
            compiled(torch.arange(9), x, residual), layer(torch.arange(9), x, residual)
        )


RECIPES: dict[str, tuple[Iterable[str], str | None, set[str]]] = {
    "some of fused linears in 16 bits": (
        ["modules_to_not_convert=['*.v_proj', '*.up_proj']"],
        None,
        {DOWN},
    ),
    "16-bit activations": (["activations={bits: 16}"], None, set()),
    "linears in 16 bits": (["modules_to_not_convert=['*.down_proj']"], None, {QKV, GATE_UP}),
    "the first generation": ([], "rrs1-w4a4kv4", set()),
    "8-bit activations": ([], "rrs-w4a8kv4", ALL),
}


@pytest.mark.parametrize("name", RECIPES)
def test_what_recipes_leave_out(name: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides, recipe, expected = RECIPES[name]
    folder = make("llama", llama(), [*overrides, FULL_CACHE], recipe)
    served = serve(folder)
    assert fused(served) == expected
    torch.testing.assert_close(
        served.logits(TOKENS), serve_apart(folder, monkeypatch).logits(TOKENS), rtol=1e-5, atol=1e-5
    )


def test_layers_that_share_an_activation(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM gives all of Gemma's layers, and all models, the same one."""
    folder = make("gemma", SERVABLE["gemma"](), ["modules_to_not_convert=['*.0.*.down_proj']", FULL_CACHE])
    served, plain = serve(folder), serve_apart(folder, monkeypatch)
    assert [fused(served, layer) for layer in (0, 1)] == [{QKV, GATE_UP}, ALL]
    torch.testing.assert_close(served.logits(TOKENS), plain.logits(TOKENS), rtol=1e-5, atol=1e-5)


def test_adapters_may_take_the_places_of_linears(make: Make) -> None:
    assert not fused(serve(make("llama", llama(), [FULL_CACHE]), enable_lora=True))


def test_a_tokens_bits_must_not_depend_on_others(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    folder = make("llama", llama(), [FULL_CACHE])
    assert fused(serve(folder)) == {DOWN}


@pytest.mark.parametrize("other", ["fuse_allreduce_rms", "enable_sp"])
def test_vllm_fuses_norms_with_sums_over_processes(
    other: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rrsq.vllm import fusion, models

    def fuse(layers: nn.Module, config: Any) -> None:
        monkeypatch.setattr(config.compilation_config.pass_config, other, True)
        fusion.fuse(layers, config)

    monkeypatch.setattr(models, "fuse", fuse)
    assert fused(serve(make("llama", llama(), [FULL_CACHE]))) == {DOWN}


def gated_attention(self: Any, positions: Tensor, hidden_states: Tensor) -> Tensor:
    qkv, _ = self.qkv_proj(hidden_states)
    query, _, _ = qkv.split([self.q_size, self.kv_size, self.kv_size], -1)
    output, _ = self.o_proj(query)
    return output * hidden_states


def parallel_layer(
    self: Any, positions: Tensor, hidden_states: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    normed = self.input_layernorm(hidden_states)
    return self.self_attn(positions, normed) + self.mlp(normed), hidden_states


def layer_that_shows(
    self: Any, positions: Tensor, hidden_states: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    normed = self.input_layernorm(hidden_states)
    return self.mlp(self.post_attention_layernorm(self.self_attn(positions, normed))), normed


def layer_that_looks(
    self: Any, positions: Tensor, hidden_states: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    normed = self.input_layernorm(hidden_states)
    if residual is not None:  # Not in the first layer.
        normed = normed * 1.0
    return self.mlp(self.post_attention_layernorm(self.self_attn(positions, normed))), hidden_states


def mlp_that_clamps(self: Any, x: Tensor) -> Tensor:
    x, _ = self.gate_up_proj(x)
    x, _ = self.down_proj(self.act_fn(x).clamp(-1.0, 1.0))
    return x


OTHERS: dict[str, tuple[str, Any, set[str]]] = {
    "an attention that reads its input twice": ("LlamaAttention", gated_attention, {GATE_UP, DOWN}),
    "two parts that read one norm": ("LlamaDecoderLayer", parallel_layer, {DOWN}),
    "a layer that returns what is normalized": ("LlamaDecoderLayer", layer_that_shows, {GATE_UP, DOWN}),
    "a layer that computes with it": ("LlamaDecoderLayer", layer_that_looks, {GATE_UP, DOWN}),
    "an MLP that computes with its gates": ("LlamaMLP", mlp_that_clamps, {QKV, GATE_UP}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_else_reads_it(name: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make("llama", llama(), [FULL_CACHE])
    serve(folder)  # vLLM can be imported from here on.
    from vllm.model_executor.models import llama as theirs

    kind, forward, expected = OTHERS[name]
    monkeypatch.setattr(getattr(theirs, kind), "forward", forward)
    assert fused(serve(folder)) == expected


@pytest.mark.parametrize("name", ["llama", "gemma"])
@pytest.mark.parametrize("added", [False, True])
def test_16_bit_norms_within_their_rounding(name: str, added: bool, make: Make) -> None:
    folder = make(name, SERVABLE[name](), [FULL_CACHE])
    layer = serve(folder).models[0].model.layers[0]
    # Not the layer: vLLM gives all models with the same RoPE the same module.
    norm, quantizer = layer.input_layernorm.bfloat16(), layer.self_attn.qkv_proj.input_quantizer
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(2 if added else 1, 50, 64, generator=generator).bfloat16()
    with torch.inference_mode():
        norm.weight.copy_(torch.randn(64, generator=generator))
        result, plain = norm(*inputs), type(norm).forward(norm, *inputs)
        if added:
            (result, total), (plain, sums) = result, plain
            torch.testing.assert_close(total, sums)
        expected = quantizer(plain)
    actual, expected = ((x.operand.float() * x.scale.unsqueeze(1)) for x in (result.quantized, expected))
    assert (actual - expected).norm() < 0.05 * expected.norm()


def test_an_input_of_another_dtype_is_normalized_as_vllm_does(make: Make) -> None:
    norm = serve(make("llama", llama(), [FULL_CACHE])).models[0].model.layers[0].input_layernorm
    x = torch.randn(3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(norm(x), type(norm).forward(norm, x))
