"""RMSNorms of loaded models by one kernel."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from rrsq.kernels import use_kernels
from rrsq.runtime.norms import NormForward, use_norm_kernels
from tiny_families import TINY, tiny_model

RMS_FAMILIES = [name for name in TINY if name not in ("opt", "starcoder2")]


def norms(model: Any) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RMS_FAMILIES)
def test_every_family_has_a_known_formula(name: str, dtype: torch.dtype) -> None:
    model = tiny_model(name).to(dtype)
    found = norms(model)
    x = {norm: torch.randn(3, norm.weight.shape[0]).to(dtype) for norm in found}
    expected = {norm: norm(x[norm]) for norm in found}
    use_norm_kernels(model)
    assert found
    for norm in found:
        assert isinstance(norm.forward, NormForward)
        assert torch.equal(norm(x[norm]), expected[norm])
    with use_kernels("triton"):
        norm = found[-1]
        torch.testing.assert_close(norm(x[norm]), expected[norm], rtol=2**-6, atol=2**-6)


def test_a_norm_of_another_kind_is_left_alone() -> None:
    class OddRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / x.abs().mean(-1, keepdim=True) * self.weight

    model = nn.Sequential(OddRMSNorm())
    use_norm_kernels(model)
    assert not isinstance(model[0].forward, NormForward)


def test_copies_and_pickles() -> None:
    model = tiny_model("llama")
    use_norm_kernels(model)
    tokens = torch.arange(2, 12).unsqueeze(0)
    expected = model(tokens).logits
    assert torch.equal(copy.deepcopy(model)(tokens).logits, expected)
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(copied(tokens).logits, expected)
    assert copied.model.norm.forward.module is copied.model.norm
