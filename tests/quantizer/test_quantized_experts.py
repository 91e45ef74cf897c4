"""Experts are quantized one by one, in batches, each with the Hessians of its own tokens."""

from __future__ import annotations

import warnings
import weakref
from typing import Any, ClassVar

import pytest
import torch

from rrsq.models import family_for
from rrsq.quantizer import experts as experts_module
from rrsq.quantizer import pipeline
from rrsq.quantizer import weights as weights_module
from rrsq.quantizer.calibration.experts import expert_statistics
from rrsq.quantizer.calibration.statistics import InputStatistics
from rrsq.quantizer.experts import batches_of_experts
from rrsq.quantizer.options import QuantizationOptions
from rrsq.quantizer.pipeline import quantize_model
from rrsq.quantizer.production.writer import checkpoint_info, model_card
from rrsq.quantizer.weights import quantize_weight
from rrsq.runtime.modules.experts import ExpertLinear, Experts, QuantizedExpertLinear
from rrsq.runtime.modules.rotation import RotatedLinear
from tiny_families import tiny_model
from tiny_quantized import logits_of, random_tokens, recipe_of

MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe"]
WINDOWS = random_tokens(6, 64, seed=1)


def experts_of(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts)}


def quantize(
    name: str, overrides: tuple[str, ...] = (), recipe_name: str = "rrs-w4a4kv4", **options: Any
) -> Any:
    recipe = recipe_of(recipe_name, overrides)
    return quantize_model(tiny_model(name), recipe, WINDOWS, QuantizationOptions(**options))


def test_each_expert_is_what_gptq_makes_of_it_with_its_own_hessian(monkeypatch: pytest.MonkeyPatch) -> None:
    """What quantize_experts is given, done again by hand for every expert of the first layer."""
    calls: list[Any] = []
    original = experts_module.quantize_experts

    def recording(layer: Any, treatments: Any, rotations: Any, routed: Any, *args: Any) -> Any:
        inside = layer.mlp.experts
        kept = Experts(inside.gate_up_proj, inside.down_proj, inside.act_fn, inside.num_experts)
        calls.append((kept, treatments, routed))
        return original(layer, treatments, rotations, routed, *args)

    monkeypatch.setattr(pipeline, "quantize_experts", recording)
    model = quantize("mixtral").model
    kept, treatments, routed = calls[0]
    cpu = torch.device("cpu")
    statistics = expert_statistics(kept, routed, range(5), cpu, with_hessian=True)
    for entry, how in treatments.items():
        linear = getattr(model.model.layers[0].mlp.experts, entry.linears[0])
        weight = getattr(kept, entry.linears[0]).weight
        codes = []
        for expert in range(5):
            hessian = statistics[expert][entry.name].hessian.matrix()
            one = quantize_weight(weight[expert], how.weights, hessian)
            codes.append(one.codes)
            stored = linear.dequantized_weight()[expert]
            steps = one.scale[:, None] * one.multiplier.repeat_interleave(linear.group_size, 1)
            torch.testing.assert_close(stored, one.codes * steps, rtol=1e-6, atol=0)
        # Another expert's Hessian gives other codes: the right one was used.
        swapped = quantize_weight(weight[0], how.weights, statistics[1][entry.name].hessian.matrix())
        assert not torch.equal(swapped.codes, codes[0])


def test_gptq_serves_each_expert_better_than_rounding() -> None:
    snr = {}
    for method in ("gptq", "rtn"):
        overrides = (f"weights.method={method}", "activations={bits: 16}", "kv_cache=null")
        layers = quantize("mixtral", overrides).report.layers
        snr[method] = [layer.output_snr_db for layer in layers]
    assert sum(snr["gptq"]) > sum(snr["rtn"]) + 1


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_experts_are_cut_into_batches_that_fit(size: int) -> None:
    one = 4 * (64**2 + 32**2)
    batches = batches_of_experts(5, [64, 32], size * one + 7)
    assert [expert for batch in batches for expert in batch] == list(range(5))
    assert all(len(batch) <= size for batch in batches)
    assert len(batches) == -(-5 // size)


def test_a_batch_has_one_expert_at_least() -> None:
    assert batches_of_experts(3, [4096, 14336], 1) == [range(0, 1), range(1, 2), range(2, 3)]


class Watched(InputStatistics):
    """Statistics that count the bytes of all Hessians that exist."""

    alive: ClassVar[weakref.WeakSet[Watched]] = weakref.WeakSet()
    peak = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        Watched.alive.add(self)
        hessians = [s.hessian for s in Watched.alive if s.hessian is not None]
        Watched.peak = max(Watched.peak, sum(part.nbytes for h in hessians for part in h.parts))


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_hessians_take_no_more_than_they_may(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rrsq.quantizer.calibration.experts.InputStatistics", Watched)
    monkeypatch.setattr(Watched, "peak", 0)
    one = 4 * (60**2 + 44**2)
    quantize("mixtral", hessian_bytes=at_once * one)
    assert Watched.peak == at_once * one


def test_the_size_of_a_batch_does_not_show_in_the_result() -> None:
    one_by_one, at_once = (
        quantize("qwen3_moe", hessian_bytes=limit).model.state_dict() for limit in (1, 2**30)
    )
    assert all(torch.equal(tensor, at_once[name]) for name, tensor in one_by_one.items())


def starved(experts: tuple[int, ...]) -> Any:
    """A model whose router never chooses some experts in its first layer."""
    model = tiny_model("qwen2_moe")

    def choose_others(router: Any, args: Any, output: Any) -> Any:
        logits = output[0].clone()
        logits[:, list(experts)] = -torch.inf
        scores, indices = logits.softmax(-1).topk(router.top_k, dim=-1)
        return logits, scores, indices

    model.model.layers[0].mlp.gate.register_forward_hook(choose_others)
    return model


def test_experts_that_saw_nothing_are_named_and_still_good() -> None:
    recipe = recipe_of("gptq-w4a16")
    with pytest.warns(UserWarning, match=r"Layer 0: the router sent few tokens .* to the experts 1, 4;"):
        quantized = quantize_model(starved((1, 4)), recipe, WINDOWS)
    assert quantized.report.layers[0].undersampled_experts == [1, 4]
    assert quantized.report.undersampled_experts == ["layer 0: 1, 4"]
    assert quantized.report.fallbacks == []
    original = tiny_model("qwen2_moe").model.layers[0]
    experts = quantized.model.model.layers[0].mlp.experts
    # On inputs like the layer's, the two are about as close to their originals as the others.
    x = original.post_attention_layernorm(quantized.model.model.embed_tokens(random_tokens(300, seed=4)))
    errors = []
    for expert in range(6):
        exact = x @ original.mlp.experts.gate_up_proj[expert].T
        error = x @ experts.gate_up_proj.dequantized_weight()[expert].T - exact
        errors.append(float(error.norm() / exact.norm()))
    assert max(errors) < 1.5 * min(errors)


def test_the_card_names_such_experts_and_all_rotations() -> None:
    with pytest.warns(UserWarning, match="few tokens"):
        quantized = quantize_model(starved((1, 4)), recipe_of("rrs1-w4a4kv4"), WINDOWS)
    info = checkpoint_info(quantized, seed=0, source_model="tiny", calibration=None)
    card = model_card(info, quantized.report)
    assert "others' were used as well: layer 0: 1, 4." in card
    assert "intermediate (20); intermediate of other MLPs (48 and 88)" in card


def test_nothing_warns_where_every_expert_saw_enough() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized = quantize("mixtral")
    assert quantized.report.undersampled_experts == []


def test_an_expert_whose_hessian_fails_is_rounded_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = weights_module.factor_hessian
    seen: list[int] = []

    def failing(hessian: torch.Tensor, **options: Any) -> Any:
        seen.append(hessian.shape[0])
        # Layer 0 has 2 inputs outside its experts, which come in pairs: the sixth is the second's down.
        return original(hessian * torch.nan if len(seen) == 6 else hessian, **options)

    monkeypatch.setattr(weights_module, "factor_hessian", failing)
    with pytest.warns(UserWarning, match=r"Layer 0, mlp\.experts\.1\.down: the Hessian could not"):
        quantized = quantize("mixtral")
    assert seen[:6] == [60, 48, 60, 44, 60, 44]
    assert quantized.report.fallbacks == ["layer 0 mlp.experts.1.down"]
    assert bool(torch.isfinite(logits_of(quantized.model, random_tokens(1, 8))).all())


@pytest.mark.parametrize("name", MIXTURES)
def test_routers_and_gates_stay_in_full_precision_in_the_rotated_basis(name: str) -> None:
    model = quantize(name, recipe_name="rrs1-w4a4kv4").model
    original = tiny_model(name)
    rotation = model.rotation_signs.residual_signs
    assert rotation is not None
    for (path, _), layer, before in zip(
        experts_of(model).items(),
        [layer for layer in model.model.layers if hasattr(layer.mlp, "experts")],
        [layer for layer in original.model.layers if hasattr(layer.mlp, "experts")],
        strict=True,
    ):
        assert path.endswith("mlp.experts")
        gain = before.post_attention_layernorm.weight
        for part in ("gate", "shared_expert_gate"):
            if hasattr(before.mlp, part):
                folded, plain = getattr(layer.mlp, part).weight, getattr(before.mlp, part).weight
                assert folded.dtype == torch.float32
                # An orthogonal matrix keeps products of rows.
                torch.testing.assert_close(folded @ folded.T, (plain * gain) @ (plain * gain).T)
                assert not torch.allclose(folded, plain * gain)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_packed_and_the_shared_expert_is_an_ordinary_mlp(name: str) -> None:
    model = quantize(name).model
    family = family_for(model.config)
    for index, layer in enumerate(model.model.layers):
        dense = {"qwen2_moe": [1], "qwen3_moe": [0]}.get(name, [])
        assert (index in dense) == (not any(entry.experts for entry in family.inputs_in(layer)))
        linears = [module for module in layer.modules() if type(module) is torch.nn.Linear]
        assert all(linear.out_features == 1 for linear in linears)  # The shared expert's gate.
        if index not in dense:
            experts = layer.mlp.experts
            for linear in (experts.gate_up_proj, experts.down_proj):
                assert isinstance(linear, QuantizedExpertLinear)
                assert not list(linear.parameters())
        if name == "qwen2_moe" and index not in dense:
            assert type(layer.mlp.shared_expert.up_proj).__name__ == "QuantizedLinear"


def test_a_stored_order_is_that_of_all_experts() -> None:
    model = quantize_model(tiny_model("mixtral"), recipe_of("rrs-paper-w4a4kv4"), WINDOWS).model
    for experts in experts_of(model).values():
        for quantizer, channels in ((experts.gate_up_input, 60), (experts.down_input, 44)):
            assert sorted(quantizer.channel_order.tolist()) == list(range(channels))
            assert quantizer.channel_order.tolist() != list(range(channels))


def test_a_part_of_the_experts_can_stay_in_full_precision() -> None:
    overrides = ("overrides=[{match: '*.experts.down', weights: {bits: 16}, activations: {bits: 16}}]",)
    quantized = quantize("mixtral", overrides)
    whole = quantize("mixtral", ("modules_to_not_convert=['*.experts.*']",))
    # The first layer's inputs are the same for all.
    snr = [run.report.layers[0].output_snr_db for run in (quantize("mixtral"), quantized, whole)]
    assert snr[0] < snr[1] < snr[2]
    for experts in experts_of(quantized.model).values():
        assert isinstance(experts.gate_up_proj, QuantizedExpertLinear)
        assert isinstance(experts.down_proj, RotatedLinear)
    for experts in experts_of(whole.model).values():
        assert isinstance(experts.gate_up_proj, RotatedLinear)
        assert isinstance(experts.gate_up_proj.linear, ExpertLinear)


def test_without_rotation_and_in_16_bits_experts_are_left_to_transformers() -> None:
    model = quantize_model(tiny_model("mixtral"), recipe_of("w16a16kv4"), WINDOWS).model
    assert not experts_of(model)
