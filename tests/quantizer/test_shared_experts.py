"""Mixtures of experts quantized by two processes, on the CPU, against one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rrsq.quantizer import pipeline
from rrsq.quantizer.calibration.experts import RoutedTokens
from rrsq.quantizer.experts import quantize_experts
from rrsq.quantizer.options import QuantizationOptions
from rrsq.quantizer.pipeline import quantize_model
from steered_mixture import NOBODYS, UPPER_HALFS, quantized_by, steered_mixture, steering_windows
from tiny_quantized import recipe_of

pytestmark = [pytest.mark.timeout(200), pytest.mark.filterwarnings("ignore:Layer .* the router sent few")]

SAMPLES, TOKENS = 8, 32


def of_one_process(name: str, recipe: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, RoutedTokens]:
    """What one process makes of the same model, and what its first mixture was called with."""
    seen: list[RoutedTokens] = []

    def recording(layer: Any, treatments: Any, rotations: Any, routed: RoutedTokens, *args: Any) -> Any:
        seen.append(routed)
        return quantize_experts(layer, treatments, rotations, routed, *args)

    monkeypatch.setattr(pipeline, "quantize_experts", recording)
    windows = steering_windows(SAMPLES, TOKENS)
    quantized = quantize_model(
        steered_mixture(name), recipe_of(recipe), windows, QuantizationOptions(stream_dtype=torch.float32)
    )
    return quantized, seen[0]


@pytest.mark.parametrize(
    ("name", "recipe", "layer"),
    [
        ("mixtral", "rrs-w4a4kv4", 0),
        ("mixtral", "rrs-paper-w4a4kv4", 0),  # It stores an order of the channels.
        ("qwen3_moe", "rrs-w4a4kv4", 1),  # Behind a dense layer.
    ],
)
def test_two_processes_make_of_a_mixture_what_one_makes(
    name: str, recipe: str, layer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their sums are in another order, so that a code may fall on the other side of a tie."""
    first, second = quantized_by(2, name, recipe, steering_windows(SAMPLES, TOKENS), tmp_path)
    assert first["model"].keys() == second["model"].keys()
    assert all(torch.equal(tensor, second["model"][key]) for key, tensor in first["model"].items())

    alone, routed = of_one_process(name, recipe, monkeypatch)
    chosen = torch.cat(routed.chosen)
    lower, upper = chosen[: len(chosen) // 2], chosen[len(chosen) // 2 :]
    assert not bool((chosen == NOBODYS).any())
    assert not bool((lower == UPPER_HALFS).any())
    assert bool((upper == UPPER_HALFS).any(1).all())

    expected = alone.model.state_dict()
    different = total = 0
    for key, tensor in first["model"].items():
        if f".layers.{layer}.mlp.experts." not in key:
            continue
        if key.endswith("weight_packed"):
            # Of every expert: one that is given to nobody would hide among the others.
            wrong = (tensor != expected[key]).flatten(1).float().mean(1)
            assert wrong.max() < 0.05, (key, wrong)
            different, total = different + int((tensor != expected[key]).sum()), total + tensor.numel()
        elif key.endswith("weight_scale"):
            # Refinement fits a row's scale to its codes.
            torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=0)
        elif key.endswith("channel_order"):
            assert torch.equal(tensor, expected[key])
    assert total > 0
    assert different < 0.01 * total
    for report, *its in zip(alone.report.layers, first["layers"], second["layers"], strict=True):
        assert all(each["undersampled_experts"] == report.undersampled_experts for each in its)
        # Each process measures its own half of the tokens.
        halves = sorted(each["output_snr_db"] for each in its)
        assert halves[0] - 0.5 < report.output_snr_db < halves[1] + 0.5
    assert NOBODYS in first["layers"][layer]["undersampled_experts"]
    assert UPPER_HALFS not in first["layers"][layer]["undersampled_experts"]


def test_all_processes_name_an_expert_that_one_of_them_could_not_round_by_gptq(tmp_path: Path) -> None:
    """The second process has experts 1 and 3: its fourth Hessian is the ``down`` of the former."""
    found = quantized_by(2, "mixtral", "rrs-w4a4kv4", steering_windows(SAMPLES, TOKENS), tmp_path, failing=3)
    for each in found:
        assert each["layers"][0]["fallbacks"] == ["mlp.experts.1.down"]
