"""What stands between a module's forward() and the launch of a kernel, with launches that do nothing."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rrsq.kernels.operation import Operation, use_kernels

if torch.cuda.is_available():
    pytest.skip("launches are replaced in Triton's interpreter", allow_module_level=True)
pytest.importorskip("triton")

_PATH = Path(__file__).parents[3] / "examples" / "host_cost.py"
_spec = importlib.util.spec_from_file_location("host_cost", _PATH)
assert _spec is not None
assert _spec.loader is not None
host_cost = sys.modules["host_cost"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(host_cost)

every_case = pytest.mark.parametrize("case", host_cost.CASES.values(), ids=host_cost.CASES)


def settled(case: Any) -> Callable[[], object]:
    """A call of the case, whose kernels are prepared."""
    call = case.call()
    for _ in range(2):
        call()
    return call


@every_case
def test_at_most_three_frames_to_a_launch(case: Any) -> None:
    with torch.inference_mode(), use_kernels("triton"), host_cost.Launches() as launches:
        count, frames = launches.of(settled(case))
    assert count > 0
    assert 0 < frames <= 3


@every_case
def test_the_kernel_is_chosen_once(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []

    def noting(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Operation[..., Any], *args: Any, **kwargs: Any) -> Any:
            chosen.append(self.name)
            return method(self, *args, **kwargs)

        return call

    for name in ("select", "_choose"):
        monkeypatch.setattr(Operation, name, noting(getattr(Operation, name)))
    with torch.inference_mode(), use_kernels("triton"), host_cost.Launches():
        call = settled(case)
        assert chosen
        chosen.clear()
        call()
        assert chosen == []


def test_large_numbers_of_tokens_are_one_class() -> None:
    case = host_cost.CASES["rrs-w4a4kv4, 2048"]
    linear = case.linear()
    with torch.inference_mode(), use_kernels("triton"), host_cost.Launches():
        for tokens in (65, 66, 200, 1000, 64, 64, 3):
            x = torch.zeros(tokens, host_cost.CHANNELS, dtype=torch.bfloat16)
            assert linear(x).shape == x.shape
    many = host_cost.CHANNELS
    assert {shape for shape, *_ in linear._prepared} == {many, (64, many), (3, many)}


@pytest.mark.parametrize("bits", [8, 4])
def test_another_weight_of_a_head_is_prepared_anew(bits: int) -> None:
    head = host_cost.head_of_8_bits() if bits == 8 else host_cost.head_of_4_bits()
    x = torch.randn(2, host_cost.CHANNELS, dtype=torch.bfloat16)
    with torch.inference_mode(), use_kernels("triton"), host_cost.Launches() as launches:
        for _ in range(3):
            head(x)
        name = head.codes
        for _ in range(3):  # What an offloaded model gets at each call.
            setattr(head, name, getattr(head, name).clone())
            assert launches.of(lambda: head(x))[0] == 1
            assert not head._prepared
            assert head._prepared_for is None
