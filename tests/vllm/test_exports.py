"""Exports in vLLM's own models, without rrsq's plugin: its configuration, fused linears and loading of them.

vLLM's kernels for such weights are compiled; formulas on the tensors that it loaded take their place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from fake_vllm import REASON, has_vllm, prepare, serve
from servable import SERVABLE, llama
from torch import Tensor

import rrsq
from tiny_quantized import logits_of, random_tokens

if TYPE_CHECKING:
    from conftest import Make

pytestmark = pytest.mark.skipif(not has_vllm(), reason=REASON)

TOKENS = random_tokens(24, seed=5)
GROUPS = "weights={method: rtn, group_size: 32}"


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """Unsigned codes ``[rows, columns]`` of int32 words."""
    places = torch.arange(0, 32, bits)
    return ((words.unsqueeze(-1) >> places) & (2**bits - 1)).flatten(-2)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Formulas in the place of compiled kernels; the names of those that vLLM would take on an H100."""
    prepare()
    from vllm.model_executor.kernels.linear import MPLinearKernel
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        compressed_tensors_w8a8_int8 as int8,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        compressed_tensors_wNa16 as packed,
    )

    names: set[str] = set()

    class Formula(MPLinearKernel):
        can_implement = classmethod(lambda cls, c: (True, None))
        get_min_capability = classmethod(lambda cls: 0)

        def process_weights_after_loading(self, layer: Any) -> None:
            pass

        def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
            words, scale, zeros, _ = self._get_weight_params(layer)
            bits = self.config.weight_type.size_bits
            codes = _unpacked(words, bits).float()
            rows, groups = scale.shape
            if zeros is None:
                zero = torch.full((rows, groups), 2.0 ** (bits - 1))
            else:
                zero = _unpacked(zeros.t(), bits).t().float()
            size = codes.shape[1] // groups
            weight = scale.repeat_interleave(size, 1) * (codes - zero.repeat_interleave(size, 1))
            return torch.nn.functional.linear(x, weight, bias)

    choose = packed.choose_mp_linear_kernel

    def choose_and_note(config: Any) -> type[MPLinearKernel]:
        names.add(choose(dataclasses.replace(config, act_type=torch.bfloat16)).__name__)
        return Formula

    class Int8Formula:
        def process_weights_after_loading(self, layer: Any) -> None:
            pass

        def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
            top = x.abs().amax(-1, keepdim=True) / 127
            weight = layer.weight.float() * layer.weight_scale
            return torch.nn.functional.linear((x / top).round() * top, weight, bias)

    choose_int8 = int8.init_int8_linear_kernel

    def choose_int8_and_note(**options: Any) -> Int8Formula:
        names.add(type(choose_int8(**options)).__name__)
        return Int8Formula()

    monkeypatch.setattr(packed, "choose_mp_linear_kernel", choose_and_note)
    monkeypatch.setattr(int8, "init_int8_linear_kernel", choose_int8_and_note)
    return names


def compare(checkpoint: Path, out: Path, ranks: int = 1) -> float:
    """Largest difference of the logits over their largest magnitude, of vLLM with the export and of rrsq."""
    rrsq.export(checkpoint, out, dtype="float32")
    theirs = serve(out, ranks).logits(TOKENS)
    ours = logits_of(rrsq.load(checkpoint, device="cpu", dtype="float32"), TOKENS.unsqueeze(0))[0]
    return float((ours - theirs).abs().max() / ours.abs().max())


# By name: overrides of w4a16-rotated, and the kernels that vLLM takes on an H100.
KINDS: dict[str, tuple[Iterable[str], set[str]]] = {
    "groups": ([GROUPS], {"MacheteLinearKernel", "MarlinLinearKernel"}),
    "zero points": (
        ["weights={method: rtn, group_size: 32, signed: true}"],
        {"MacheteLinearKernel", "MarlinLinearKernel"},
    ),
    "a scale a row, 8-bit head": (
        ["weights={method: rtn}", "head.bits=8"],
        {"MacheteLinearKernel", "MarlinLinearKernel"},
    ),
    "4-bit head": ([GROUPS, "head.bits=4"], {"MacheteLinearKernel", "MarlinLinearKernel"}),
    "int8 inputs": ([GROUPS, "activations.bits=8"], {"CutlassInt8ScaledMMLinearKernel"}),
    "int8 inputs, 8-bit head": (
        [GROUPS, "activations.bits=8", "head.bits=8"],
        {"CutlassInt8ScaledMMLinearKernel", "MacheteLinearKernel", "MarlinLinearKernel"},
    ),
    "kept and mixed": (
        [
            GROUPS,
            "modules_to_not_convert=['*.0.self_attn.*']",
            "overrides=[{match: '*.1.mlp.down', activations: {bits: 8}}]",
        ],
        {"CutlassInt8ScaledMMLinearKernel", "MacheteLinearKernel", "MarlinLinearKernel"},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_export(kind: str, make: Make, chosen: set[str], tmp_path: Path) -> None:
    overrides, kernels = KINDS[kind]
    config = llama()
    config.head_dim = 16
    checkpoint = make("llama16", config, overrides, "w4a16-rotated")
    # A code of an input that falls the other way is a difference of one of 127 levels.
    assert compare(checkpoint, tmp_path / "out") < (3e-2 if "int8" in kind or "mixed" in kind else 1e-5)
    assert chosen
    assert chosen <= kernels


# LayerNorms and norms behind attention and MLP, and Gemma's head: what R1 is in the way of.
WITHOUT_R1 = ("gemma", "gemma2", "gemma3_text", "olmo2", "olmo3", "exaone4", "opt")


@pytest.mark.parametrize("name", [name for name in SERVABLE if "moe" not in name and name != "mixtral"])
def test_families(name: str, make: Make, chosen: set[str], tmp_path: Path) -> None:
    config = SERVABLE[name]()
    if getattr(config, "head_dim", None) is not None:
        config.head_dim = 16
    without = ["rotation.residual=false"] if name in WITHOUT_R1 else []
    checkpoint = make(f"{name}16", config, [GROUPS, *without], "w4a16-rotated")
    assert compare(checkpoint, tmp_path / "out") < 1e-5


def test_processes_share_an_export(make: Make, chosen: set[str], tmp_path: Path) -> None:
    config = llama()
    config.head_dim, config.intermediate_size = 16, 128
    checkpoint = make("llama wide", config, [GROUPS, "head.bits=8"], "w4a16-rotated")
    assert compare(checkpoint, tmp_path / "out", ranks=2) < 1e-5
