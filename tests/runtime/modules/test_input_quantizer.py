"""The input quantizer: the forms of what it gives, and what they stand for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rrsq.runtime.modules.input import FloatInput, InputQuantizer, InputScheme, Int8Input, SmoothedInput
from rrsq.runtime.modules.rotation import OnlineHadamard
from rrsq.runtime.rotation.hadamard import orthonormal, plan_hadamard

CHANNELS = 48


def activations(*shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(*shape, CHANNELS, generator=torch.Generator().manual_seed(seed))
    x[..., 5] *= 20
    return x


def smoothed_scheme(**changes: Any) -> InputScheme:
    return replace(InputScheme(CHANNELS, bits=4, group_size=16, scope="sequence"), **changes)


def with_order(quantizer: InputQuantizer, seed: int = 0) -> InputQuantizer:
    assert quantizer.channel_order is not None
    order = torch.randperm(CHANNELS, generator=torch.Generator().manual_seed(seed))
    quantizer.channel_order.copy_(order)
    return quantizer


def test_the_group_size_is_reduced_to_a_divisor() -> None:
    assert InputScheme(576, 4, group_size=128).group_size == 64
    assert InputScheme(90, 4, group_size=16).group_size == 2


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        (InputScheme(CHANNELS, 16), FloatInput),
        (InputScheme(CHANNELS, 4), Int8Input),
        (InputScheme(CHANNELS, 8), Int8Input),
        (InputScheme(CHANNELS, 4, group_size=16, scales="integer"), Int8Input),
        (smoothed_scheme(), SmoothedInput),
        (smoothed_scheme(scope="token"), SmoothedInput),
        (smoothed_scheme(channel_order="per_call"), FloatInput),
    ],
)
def test_each_scheme_has_its_form(scheme: InputScheme, kind: type) -> None:
    assert isinstance(InputQuantizer(scheme)(activations(2, 3)), kind)


def test_sixteen_bits_are_left_alone_but_rotated() -> None:
    x = activations(2, 3)
    plain = InputQuantizer(InputScheme(CHANNELS, 16))(x)
    assert isinstance(plain, FloatInput)
    assert torch.equal(plain.x, x.view(6, CHANNELS))
    plan = plan_hadamard(CHANNELS)
    rotated = InputQuantizer(InputScheme(CHANNELS, 16), OnlineHadamard(plan))(x.to(torch.bfloat16))
    assert isinstance(rotated, FloatInput)
    assert rotated.x.dtype == torch.bfloat16
    expected = x.to(torch.bfloat16).double().numpy().reshape(6, -1) @ orthonormal(plan, torch.float64).numpy()
    np.testing.assert_allclose(rotated.x.double().numpy(), expected, rtol=0.01, atol=0.02)


def test_a_stored_order_permutes_codes_and_not_the_meaning() -> None:
    """Codes come in the stored order; what they stand for comes back in the original one."""
    x = activations(7)
    quantizer = with_order(InputQuantizer(smoothed_scheme(channel_order="calibrated")))
    result = quantizer(x)
    assert isinstance(result, SmoothedInput)
    assert quantizer.channel_order is not None
    order = quantizer.channel_order.numpy()
    value = result.codes.double().numpy() * result.scale.double().numpy()[:, None]
    value *= result.group_scale.double().numpy().repeat(16, 1)
    restored = np.empty_like(value)
    restored[:, order] = value
    np.testing.assert_allclose(quantizer.simulate(x).numpy(), restored, rtol=1e-6)
    half_step = (result.scale.double().numpy()[:, None] * result.group_scale.numpy().repeat(16, 1)) / 2
    assert (np.abs(x.numpy()[:, order] - value) <= half_step * (1 + 1e-5)).all()


def test_sorting_in_each_call_groups_channels_of_like_size() -> None:
    """The simulation of the authors' code: groups are runs of the channels sorted by magnitude."""
    x = activations(9)
    simulated = InputQuantizer(smoothed_scheme(channel_order="per_call")).simulate(x).double().numpy()
    exact = x.double().numpy()
    order = np.abs(exact).max(0).argsort()
    expected = np.empty_like(exact)
    scales = np.abs(exact[:, order]).reshape(9, 3, 16).max((0, 2)).repeat(16)
    smooth = exact[:, order] / scales
    step = np.abs(smooth).max(1, keepdims=True) / 7
    expected[:, order] = np.round(smooth / step) * step * scales
    np.testing.assert_allclose(simulated, expected, rtol=1e-5, atol=1e-6)
