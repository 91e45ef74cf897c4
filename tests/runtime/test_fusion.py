"""Layers of few kernels: the same numbers, and the modules' own forward pass if something is in the way."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rrsq.kernels.operation import Operation
from rrsq.runtime import fusion, norms
from rrsq.runtime.fusion import GatedForward, RotaryForward
from rrsq.runtime.kv_cache.quantizer import KVQuantizer
from rrsq.runtime.modules.deferred import DeferredInput, fuses
from rrsq.runtime.ready import make_ready
from tiny_families import TINY, tiny_model
from tiny_quantized import logits_of, quantize_tiny, random_tokens, recipe_of

RECIPE = ("rrs-w4a4kv4", ["weights.method=rtn"])
OPERATIONS = ("rms_norm_quantize", "add_rms_norm_quantize", "gated_quantize", "rotary")
# By family: how often a layer runs each. None: some of its layers have no RoPE.
EXPECTED = {
    "llama": (1, 1, 1, 1),
    "qwen2": (1, 1, 1, 1),
    "qwen3": (1, 1, 1, 1),
    "seed_oss": (1, 1, 1, 1),
    "smollm3": (1, 1, 1, None),
    "gemma2": (2, 0, 1, 1),
    "gemma3_text": (2, 0, 1, 1),
    "granite": (2, 0, 1, 1),
    "olmo3": (0, 0, 1, 1),
    "exaone4": (0, 0, 1, None),
    "phi3": (1, 1, 1, 1),
    "phi3 longrope": (1, 1, 1, 1),
    "mixtral": (1, 0, 0, 1),
    "starcoder2": (0, 0, 0, 1),
    "arcee": (1, 1, 0, 1),
    "opt": (0, 0, 0, 0),
}
TOKENS = random_tokens(2, 9)


def ready_model(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    tiny_model(name).save_pretrained(folder)
    model = quantize_tiny(folder, recipe_of(*RECIPE)).model.eval().to(dtype)
    make_ready(model)
    return model


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, on: bool = True) -> None:
    """On a CPU too, where the operations' references compute."""
    kept = (lambda x: not torch.is_grad_enabled() and not torch.compiler.is_compiling()) if on else fuses
    for module in (fusion, norms):
        monkeypatch.setattr(module, "fuses", kept)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often each operation has run."""
    made: Counter[str] = Counter()

    def noting(original: Any) -> Any:
        def method(self: Any, *args: Any) -> Any:
            function = original(self, *args)

            def run(*args: Any, **kwargs: Any) -> Any:
                made[self.name] += 1
                return function(*args, **kwargs)

            return run

        return method

    for name in ("prepare", "_choose"):
        monkeypatch.setattr(Operation, name, noting(getattr(Operation, name)))
    return made


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return ready_model("llama", tmp_path_factory.mktemp("llama"))


@torch.no_grad()
def settled(model: Any) -> Tensor:
    """Logits of the third call: the second prepares."""
    for _ in range(2):
        logits_of(model, TOKENS, use_cache=False)
    return logits_of(model, TOKENS, use_cache=False)


@pytest.mark.parametrize("name", EXPECTED)
def test_every_family_gives_the_same_bits(
    name: str, tmp_path: Path, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ready_model(name, tmp_path)
    expected = settled(model)
    as_on_a_gpu(monkeypatch)
    settled(model)
    calls.clear()
    with torch.no_grad():
        logits = logits_of(model, TOKENS, use_cache=False)
    assert torch.equal(logits, expected)
    layers = model.config.get_text_config().num_hidden_layers
    for operation, count in zip(OPERATIONS, EXPECTED[name], strict=True):
        if count is None:
            assert 0 < calls[operation] < layers
        else:
            assert calls[operation] == count * layers


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "qwen3", "mixtral"])
def test_on_a_gpu(name: str, tmp_path: Path, calls: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same logits but for what 16 bits and 4-bit codes make of a last bit."""
    model = ready_model(name, tmp_path, torch.bfloat16).cuda()
    given = TOKENS.cuda()
    with torch.no_grad():
        for _ in range(3):
            calls.clear()
            fused = model(given, use_cache=False).logits.float()
    layers = model.config.num_hidden_layers
    assert [calls[operation] for operation in OPERATIONS] == [count * layers for count in EXPECTED[name]]
    with torch.no_grad(), monkeypatch.context() as without:
        without.setattr(norms.NormForward, "defers", lambda self, x: False)
        without.setattr(fusion, "fuses", lambda x: False)
        calls.clear()
        expected = model(given, use_cache=False).logits.float()
    assert not any(calls[operation] for operation in OPERATIONS)
    assert float((fused - expected).norm() / expected.norm()) < 0.3


def test_every_gated_mlp_and_rotary_attention_is_known() -> None:
    assert set(EXPECTED) <= set(TINY)
    for name in ("gemma", "mistral", "olmo2", "qwen3_moe"):
        attention = tiny_model(name).model.layers[0].self_attn
        assert fusion._is_rotary(type(attention).forward.__globals__["apply_rotary_pos_emb"])


def test_16_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RoPE is rounded once in place of three times, all else is the same."""
    model = ready_model("gemma2", tmp_path, torch.bfloat16)
    expected = settled(model)
    as_on_a_gpu(monkeypatch)
    logits = settled(model)
    assert float((logits - expected).norm() / expected.norm()) < 0.3
    monkeypatch.setattr(fusion, "_is_rotary", lambda function: False)
    assert torch.equal(settled(model), expected)


def hook_on(path: str, pre: bool = False) -> Any:
    def change(model: Any) -> None:
        module = model.get_submodule(path)
        if pre:
            module.register_forward_pre_hook(lambda module, args: None)
        else:
            module.register_forward_hook(lambda module, args, output: check(output))

    def check(output: Any) -> None:
        assert type(output) is Tensor

    return change


class Adapter(nn.Module):
    """Calls the linear that it stands for, as PEFT's do."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base

    def forward(self, x: Tensor) -> Tensor:
        assert type(x) is Tensor
        return self.base_layer(x) + 0 * x.sum()


def adapter_at(path: str) -> Any:
    return lambda model: model.set_submodule(path, Adapter(model.get_submodule(path)))


LAYER = "model.layers.0."
CHANGES = {
    "hook on a norm": (hook_on(LAYER + "input_layernorm"), (1, 0)),
    "hook on a norm in the middle": (hook_on(LAYER + "post_attention_layernorm"), (1, 0)),
    "hook before a norm": (hook_on(LAYER + "post_attention_layernorm", pre=True), (0, 0)),
    "hook on down": (hook_on(LAYER + "mlp.down_proj"), (0, 1)),
    "hook on an activation": (hook_on(LAYER + "mlp.act_fn"), (0, 1)),
    "hook before a gate": (hook_on(LAYER + "mlp.gate_proj", pre=True), (0, 1)),
    "adapter at v": (adapter_at(LAYER + "self_attn.v_proj"), (1, 0)),
    "adapter at up": (adapter_at(LAYER + "mlp.up_proj"), (1, 1)),
    "adapter at down": (adapter_at(LAYER + "mlp.down_proj"), (0, 1)),
}


@pytest.mark.parametrize(("change", "missing"), CHANGES.values(), ids=CHANGES)
def test_what_is_in_the_way(
    change: Any, missing: tuple[int, int], llama: Any, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(llama)
    expected = settled(model)
    change(model)
    as_on_a_gpu(monkeypatch)
    settled(model)
    calls.clear()
    with torch.no_grad():
        assert torch.equal(logits_of(model, TOKENS, use_cache=False), expected)
    norms_in_front = calls["rms_norm_quantize"] + calls["add_rms_norm_quantize"]
    assert (4 - norms_in_front, 2 - calls["gated_quantize"]) == missing


def test_a_hook_before_the_attention_gets_a_tensor(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was registered to run first."""
    model, seen = copy.deepcopy(llama), []
    expected = settled(model)
    model.model.layers[1].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(type(kwargs["hidden_states"])),
        with_kwargs=True,
        prepend=True,
    )
    as_on_a_gpu(monkeypatch)
    assert torch.equal(settled(model), expected)
    assert set(seen) == {Tensor}


def test_copies_and_pickles(llama: Any, calls: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = settled(llama)
    as_on_a_gpu(monkeypatch)
    for twin in (copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))):
        settled(twin)
        calls.clear()
        assert torch.equal(settled(twin), expected)
        assert calls["rms_norm_quantize"] == calls["add_rms_norm_quantize"] == 6
        mlp, attention = twin.model.layers[0].mlp, twin.model.layers[0].self_attn
        assert isinstance(mlp.forward, GatedForward)
        assert mlp.forward.module is mlp
        assert isinstance(attention.forward, RotaryForward)
        assert attention.forward.module is attention


def test_gradients_take_the_long_way(
    llama: Any, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    as_on_a_gpu(monkeypatch)
    x = llama.get_input_embeddings()(TOKENS).detach().requires_grad_()
    llama(inputs_embeds=x, use_cache=False).logits.square().mean().backward()
    assert x.grad is not None
    assert bool(x.grad.any())
    assert not any(calls[operation] for operation in OPERATIONS)


def test_compiled_it_is_what_it_was(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(llama)
    expected = settled(model)
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(KVQuantizer, "reads_codes", lambda self, device: False)
    with torch.no_grad():
        compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
        assert torch.equal(compiled(TOKENS, use_cache=False).logits, expected)


def test_hidden_states_are_tensors(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        expected = llama(TOKENS, use_cache=False, output_hidden_states=True).hidden_states
        as_on_a_gpu(monkeypatch)
        states = llama(TOKENS, use_cache=False, output_hidden_states=True).hidden_states
    assert len(states) == len(expected) == 3
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(states, expected, strict=True))


def test_a_rotary_function_of_another_kind_is_left_alone(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        turned = [torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) for x in (q, k)]
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return q * cos + turned[0] * sin, k * cos + turned[1] * sin

    own = type(llama.model.layers[0].self_attn).forward.__globals__
    monkeypatch.setitem(own, "apply_rotary_pos_emb", interleaved)
    expected = settled(llama)
    as_on_a_gpu(monkeypatch)
    assert not fusion._is_rotary(interleaved)
    assert torch.equal(settled(llama), expected)


def test_a_deferred_input_is_the_tensor_to_whoever_wants_it() -> None:
    x = torch.randn(2, 3)
    operation: Any = None
    deferred: Any = DeferredInput(operation, (x,), (), lambda: x * 2, x.shape)
    assert torch.equal(torch.relu(deferred), torch.relu(x * 2))
    assert torch.equal(nn.functional.linear(deferred, torch.eye(3)), x * 2)
    assert torch.equal(x + deferred, 3 * x)
    assert torch.equal(deferred[0], 2 * x[0])
    assert torch.equal(deferred.reshape(-1), (2 * x).reshape(-1))
    assert deferred.size(1) == 3


def test_a_pending_norm_does_not_keep_itself() -> None:
    norm = nn.RMSNorm(8)
    deferred, total = norms.NormForward(norm, 1e-6, 0.0, False).added(torch.ones(2, 8), torch.ones(2, 8))
    assert torch.equal(total(), torch.full((2, 8), 2.0))
    gone = weakref.ref(deferred)
    del deferred, total
    assert gone() is None


def test_what_else_an_attention_calls_may_be_replaced(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name in its module, after calls: as libraries do that patch transformers."""
    as_on_a_gpu(monkeypatch)
    attention = llama.model.layers[0].self_attn
    own, asked = type(attention).forward.__globals__, []
    expected = settled(llama)
    functions = own["ALL_ATTENTION_FUNCTIONS"]

    class Noting:
        def __getattr__(self, name: str) -> Any:
            asked.append(name)
            return getattr(functions, name)

    monkeypatch.setitem(own, "ALL_ATTENTION_FUNCTIONS", Noting())
    assert torch.equal(settled(llama), expected)
    assert asked


def test_an_attention_copies_no_globals_at_its_calls(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_gpu(monkeypatch)
    settled(llama)
    made: list[Any] = []
    monkeypatch.setattr(fusion, "_Twin", lambda *args: made.append(args))
    settled(llama)
    assert not made
