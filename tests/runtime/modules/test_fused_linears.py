"""Linears of one input as one: the same numbers, the same tensors, whatever is done to the model."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rrsq import kernels
from rrsq.runtime.modules.input import InputQuantizer, InputScheme
from rrsq.runtime.modules.linear import FusedLinears, Projections, QuantizedLinear
from rrsq.runtime.modules.rotation import OnlineHadamard
from rrsq.runtime.rotation.hadamard import plan_hadamard

IN = 96
ROWS = {"q_proj": 64, "k_proj": 32, "v_proj": 16}
SCHEMES = {
    "W4A16": InputScheme(IN, 16),
    "A8 a token": InputScheme(IN, 8),
    "multipliers": InputScheme(IN, 4, clip=0.9333, group_size=16, scales="integer"),
    "sequence": InputScheme(IN, 4, group_size=32, scope="sequence"),
    "stored order": InputScheme(IN, 4, group_size=32, scope="sequence", channel_order="calibrated"),
}
INTEGER = SCHEMES["multipliers"]


class Attention(nn.Module):
    """Calls its projections as transformers' attentions do."""

    def __init__(self, scheme: InputScheme, *, bias: bool = True, group_size: int | None = 32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        quantizer = InputQuantizer(scheme, OnlineHadamard(plan_hadamard(IN)))
        if quantizer.channel_order is not None:
            quantizer.channel_order.copy_(torch.randperm(IN, generator=generator))
        for name, rows in ROWS.items():
            linear = QuantizedLinear(
                IN, rows, group_size=group_size, bias=bias, input_quantizer=quantizer, dtype=torch.float32
            )
            set_random_weight(linear, generator)
            setattr(self, name, linear)
        self.qkv_input = quantizer

    def forward(self, hidden_states: Tensor) -> Tensor:
        shape = (*hidden_states.shape[:-1], -1)
        parts = [getattr(self, name)(hidden_states).view(shape) for name in ROWS]
        return torch.cat(parts, dim=-1)


def set_random_weight(linear: QuantizedLinear, generator: torch.Generator) -> None:
    out_features, groups = linear.out_features, IN // 32
    codes = torch.randint(-8, 8, (out_features, IN), generator=generator)
    multiplier = torch.randint(1, 16, (out_features, groups), generator=generator).byte()
    linear.set_weight(codes, torch.rand(out_features, generator=generator) * 0.01 + 0.001, multiplier)
    if linear.bias is not None:
        linear.bias.copy_(torch.randn(out_features, generator=generator))


def fused(scheme: InputScheme, **options: Any) -> Attention:
    attention = Attention(scheme, **options)
    attention.qkv_fused = FusedLinears(attention, tuple(ROWS))
    return attention


def activations(*shape: int, seed: int = 5) -> Tensor:
    x = torch.randn(*shape, IN, generator=torch.Generator().manual_seed(seed))
    x[..., 7] *= 15
    return x


class Calls:
    """Notes the calls of kernels, prepared or not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        self.made: list[str] = []
        self.channels: list[int] = []
        for name in names:
            original = getattr(kernels, name)
            call = self.noting(name, original)
            call.prepare = self.preparing(name, original)
            monkeypatch.setattr(kernels, name, call)

    def noting(self, name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.made.append(name)
            self.channels.append(args[0].shape[-1])
            return function(*args, **kwargs)

        return call

    def preparing(self, name: str, original: Any) -> Any:
        return lambda *args: self.noting(name, original.prepare(*args))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("group_size", [None, 32], ids=["a row", "groups"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_together_as_alone(scheme: InputScheme, group_size: int | None, bias: bool) -> None:
    alone = Attention(scheme, bias=bias, group_size=group_size)
    together = fused(scheme, bias=bias, group_size=group_size)
    x = activations(2, 5)
    expected = alone(x)
    if scheme.bits == 16:  # Another product of floats.
        torch.testing.assert_close(together(hidden_states=x), expected, rtol=1e-5, atol=1e-4)
    else:
        assert torch.equal(together(x), expected)
        assert torch.equal(together(hidden_states=x), expected)
    assert list(together.state_dict()) == list(alone.state_dict())
    for name, tensor in alone.state_dict().items():
        assert torch.equal(together.state_dict()[name], tensor)


def test_one_quantization_and_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch, "quantize_tokens", "linear_int8")
    attention, x = fused(INTEGER), activations(3)
    for number in range(4):
        calls.made.clear()
        attention(x)
        if number > 1:  # The second call prepares.
            assert calls.made == ["quantize_tokens", "linear_int8"]


def with_plain_keys(*, together: bool) -> Attention:
    """Keys in full precision between quantized queries and values."""
    attention = Attention(INTEGER)
    attention.k_proj = nn.Linear(IN, ROWS["k_proj"]).requires_grad_(False)
    attention.k_proj.weight.copy_(torch.randn(ROWS["k_proj"], IN, generator=torch.Generator().manual_seed(2)))
    attention.k_proj.bias.zero_()
    if together:
        attention.qkv_fused = FusedLinears(attention, ("q_proj", "v_proj"), ("k_proj",))
    return attention


@pytest.mark.parametrize("tokens", [1, 3, 65])
def test_linears_beside_one_in_full_precision(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, together = with_plain_keys(together=False), with_plain_keys(together=True)
    x = activations(tokens)
    expected = alone(x)
    for _ in range(3):
        assert torch.equal(together(x), expected)
        assert torch.equal(together(hidden_states=x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(together))(x), expected)
    compiled = torch.compile(copy.deepcopy(together), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), expected)
    calls = Calls(monkeypatch, "quantize_tokens", "linear_int8")
    fresh = with_plain_keys(together=True)
    for _ in range(3):
        calls.made.clear()
        fresh(x)
    assert calls.made == ["quantize_tokens", "linear_int8"]


def test_each_works_by_itself_where_the_one_in_full_precision_is_replaced() -> None:
    """An adapter in its place may do with the input what it likes."""
    attention, x = with_plain_keys(together=True), activations(3)
    expected = attention(x)
    base = attention.k_proj

    class Adapter(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[-1] == IN
            return base(x) + x.sum(-1, keepdim=True) * 0

    attention.k_proj = Adapter()
    assert torch.equal(attention(x), expected)


def test_the_weight_is_in_memory_once() -> None:
    attention = fused(INTEGER)
    attention(activations(3))
    for name in ("weight_packed", "weight_scale", "weight_multiplier", "bias"):
        storages = {getattr(attention, key).get_buffer(name).untyped_storage().data_ptr() for key in ROWS}
        assert len(storages) == 1


def test_a_linear_in_another_hand_gets_the_input_itself() -> None:
    """As an adapter does, which calls the linear it stands for and adds to the result."""

    class Adapter(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[-1] == IN
            return self.base(x) + x[..., :1]

    attention, x = fused(INTEGER), activations(3)
    expected = attention(x)
    expected[..., 64:96] += x[..., :1]
    attention.k_proj = Adapter(attention.k_proj)
    torch.testing.assert_close(attention(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("how", ["set_weight", "load_state_dict", "setattr"])
def test_new_weights_are_noticed(how: str) -> None:
    attention, x = fused(INTEGER), activations(3)
    attention(x)
    other = Attention(INTEGER)
    for key in ROWS:
        set_random_weight(getattr(other, key), torch.Generator().manual_seed(9))
    if how == "load_state_dict":
        attention.load_state_dict(other.state_dict())
    else:
        for key in ROWS:
            linear, twin = getattr(attention, key), getattr(other, key)
            if how == "set_weight":
                set_random_weight(linear, torch.Generator().manual_seed(9))
            else:
                for name, buffer in twin.named_buffers():
                    setattr(linear, name, buffer)
    assert torch.equal(attention(x), other(x))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_is_its_own(how: str) -> None:
    attention, x = fused(INTEGER), activations(3)
    expected = attention(x)
    size = sum(t.nbytes for t in attention.state_dict().values())
    if how == "deepcopy":
        twin = copy.deepcopy(attention)
    elif how == "pickle":
        data = pickle.dumps(attention)
        assert len(data) < size + 12000  # Neither unpacked copies nor one storage for each of its views.
        twin = pickle.loads(data)
    else:
        file = io.BytesIO()
        torch.save(attention, file)
        assert file.tell() < size + 12000
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    set_random_weight(attention.v_proj, torch.Generator().manual_seed(3))
    assert torch.equal(twin(x), expected)
    assert not torch.equal(attention(x), expected)


def test_a_model_can_be_copied_after_a_forward_pass_that_failed() -> None:
    attention = fused(INTEGER)
    expected = attention(activations(3))

    def fail(*args: Any) -> None:
        raise ValueError("stopped")

    handle = attention.v_proj.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="stopped"):
        attention(activations(3, seed=1))
    handle.remove()
    assert torch.equal(pickle.loads(pickle.dumps(attention))(activations(3)), expected)


@pytest.mark.parametrize("order", ["half after", "half before"])
def test_casts_in_any_order(order: str) -> None:
    x = activations(4)
    exact = Attention(INTEGER)(x)
    attention = fused(INTEGER)
    if order == "half after":
        attention(x)
    attention.half()
    y = attention(x.half())
    assert y.dtype == torch.float16
    assert attention.q_proj.weight_scale.dtype == torch.float32
    assert attention.q_proj.bias is not None
    assert attention.q_proj.bias.dtype == torch.float16
    assert float((y.float() - exact).norm() / exact.norm()) < 0.02
    assert torch.equal(
        attention.float().to("cpu")(x.half().float()), Attention(INTEGER).half().float()(x.half().float())
    )


def test_nothing_is_held_on_the_meta_device() -> None:
    attention = fused(INTEGER)
    attention(activations(3))
    attention.to("meta")
    assert attention.qkv_fused._joined is None
    assert isinstance(attention.qkv_fused(activations(1)), Tensor)


@pytest.mark.parametrize("tokens", [1, 3, 64, 65])
def test_prepared_calls_are_the_first_ones(tokens: int) -> None:
    """What is looked up once gives the same numbers, for other tokens too, and forgets an old weight."""
    attention, alone = fused(INTEGER), Attention(INTEGER)
    first, second = activations(tokens), activations(tokens, seed=1)
    expected = alone(first), alone(second)
    for _ in range(3):
        for module in (attention, alone):
            assert torch.equal(module(first), expected[0])
            assert torch.equal(module(second), expected[1])
    for module in (attention, alone):
        set_random_weight(module.k_proj, torch.Generator().manual_seed(3))
    fresh = Attention(INTEGER)
    set_random_weight(fresh.k_proj, torch.Generator().manual_seed(3))
    assert torch.equal(attention(first), fresh(first))
    assert torch.equal(alone(first), fresh(first))
    assert not torch.equal(fresh(first), expected[0])


def test_a_weight_that_comes_and_goes_is_not_held() -> None:
    """As with offloading: every call finds another tensor, and none outlives it."""
    attention, x = Attention(INTEGER), activations(1)
    expected = attention(x)
    linear = attention.q_proj
    for _ in range(4):
        linear.weight_packed = linear.weight_packed.clone()
        held = weakref.ref(linear.weight_packed)
        assert torch.equal(attention(x), expected)
        linear.weight_packed = linear.weight_packed.clone()
        gc.collect()
        assert held() is None


def test_threads_do_not_get_each_others_results() -> None:
    attention = fused(INTEGER)
    inputs = [activations(1 + seed % 3, seed=seed) for seed in range(40)]
    expected = [Attention(INTEGER)(x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for result, y in zip(pool.map(attention, inputs), expected, strict=True):
                assert torch.equal(result, y)


def test_compiled_whole_with_one_product() -> None:
    """What is traced has one quantization and one product, in one graph."""
    attention, x = fused(INTEGER), activations(3)
    expected = attention(x)
    names: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes if "rrsq" in str(node.target))
        return graph.forward

    compiled = torch.compile(attention, backend=backend, fullgraph=True)
    assert torch.equal(compiled(x), expected)
    assert [name.split(".")[1] for name in names] == ["quantize_tokens", "linear_int8"]


def test_projections_look_like_the_input() -> None:
    x = activations(2, 3)
    result = fused(INTEGER).qkv_fused(x)
    assert isinstance(result, Projections)
    assert result.shape == result.size() == x.shape
    assert (result.dtype, result.device) == (x.dtype, x.device)
    assert [y.shape[-1] for y in result.outputs] == list(ROWS.values())
