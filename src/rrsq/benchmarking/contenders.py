"""What is timed: our products and stages, and what people would use instead.

A contender turns a problem into a call that computes ``x @ weight.T`` (or a part of it), and says what its
result is compared with. Adding one is a function and an entry in :data:`CONTENDERS`.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rrsq import kernels
from rrsq.kernels.linear_int8 import int8_matmul

from .linear_scheme import LinearScheme
from .problem import Problem
from .shapes import LinearShape

__all__ = ["CONTENDERS", "Call", "Contender", "contenders_for", "quantize"]

_LARGEST_SMOOTHING_GROUP = 128

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Contender:
    """One row of the table."""

    name: str
    describes: str
    prepare: Callable[[Problem], Call]
    """Do what is done once, return what is timed."""
    expected: Callable[[Problem], Tensor]
    """The result in float64 to compare with."""
    tolerance: float = 0.0
    """Largest relative error (Frobenius norms) that is correct."""
    unavailable: Callable[[torch.device], str | None] = lambda device: None
    """Why it cannot run on a device, or None."""
    weight_bits: float | None = None
    """Bits of the weight that a call reads; None: those of the recipe, multipliers included."""
    stage: bool = False
    """Whether it is a stage of a linear, with no arithmetic rate of its own."""
    turn: str | None = None
    """Neighbours of the same turn are timed alternately, for small differences."""
    only_rotated: bool = False
    """Whether it exists only where the input is rotated as a whole."""
    only_grouped: bool = False
    """Whether it exists only where groups of activations have multipliers."""


def _smoothing_group(problem: Problem) -> int:
    return math.gcd(problem.shape.in_features, _LARGEST_SMOOTHING_GROUP)


def _rotation(problem: Problem) -> dict[str, object]:
    if problem.base is None:
        return {}
    return {"base": problem.base, "hadamard_block": problem.shape.in_features}


def quantize(problem: Problem, *, smoothed: bool = True, rotated: bool = True) -> tuple[Tensor, Tensor]:
    """The int8 operand and the scales of a problem's activations, as its scheme says.

    Args:
        problem: with the activations.
        smoothed: whether groups have multipliers.
        rotated: whether an input that is rotated as a whole is; blocks always are.
    """
    scheme = problem.scheme
    group_size = scheme.group_size if smoothed else None
    if scheme.block is not None:
        return kernels.quantize_signed(problem.x, scheme.bits, group_size, scheme.block)
    rotation = _rotation(problem) if rotated else {}
    return kernels.quantize_tokens(problem.x, scheme.bits, group_size, scheme.clip, **rotation)  # type: ignore[arg-type]


def _product(problem: Problem, operand: Tensor, scale: Tensor) -> Tensor:
    return kernels.linear_int8(
        operand,
        scale,
        problem.packed,
        problem.weight_scale,
        problem.multiplier,
        None,
        torch.bfloat16,
        problem.unpacked,
    )


def _ours_product(problem: Problem) -> Call:
    operand, scale = quantize(problem)
    return lambda: _product(problem, operand, scale)


def _ours_unsmoothed(problem: Problem) -> Call:
    operand, scale = quantize(problem, smoothed=False)
    return lambda: _product(problem, operand, scale)


def _ours_linear(problem: Problem) -> Call:
    return lambda: _product(problem, *quantize(problem))


def _ours_quantization(problem: Problem) -> Call:
    return lambda: quantize(problem, rotated=False)[0]


def _ours_rotated_quantization(problem: Problem) -> Call:
    return lambda: quantize(problem)[0]


def _quantize_smoothed(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    clip = problem.scheme.clip
    return kernels.quantize_smoothed(problem.x, 4, _smoothing_group(problem), "sequence", "max", clip)


def _ours_group_scaled(problem: Problem) -> Call:
    codes, scale, group_scale = _quantize_smoothed(problem)
    return lambda: kernels.linear_group_scaled(
        codes,
        scale,
        group_scale,
        problem.x.shape[0],
        problem.packed,
        problem.weight_scale,
        None,
        torch.bfloat16,
        problem.multiplier,
        problem.unpacked,
    )


def _weight(problem: Problem) -> Tensor:
    with kernels.use_kernels("eager"):
        operand = kernels.weight_operand(problem.packed, problem.multiplier)
    return operand.double() * problem.weight_scale.double()[:, None]


def _expected_product(smoothed: bool) -> Callable[[Problem], Tensor]:
    def expected(problem: Problem) -> Tensor:
        with kernels.use_kernels("eager"):
            operand, scale = quantize(problem, smoothed=smoothed)
        return (operand.double() * scale.double()[:, None]) @ _weight(problem).T

    return expected


def _expected_operand(rotated: bool) -> Callable[[Problem], Tensor]:
    def expected(problem: Problem) -> Tensor:
        with kernels.use_kernels("eager"):
            return quantize(problem, rotated=rotated)[0].double()

    return expected


def _expected_group_scaled(problem: Problem) -> Tensor:
    with kernels.use_kernels("eager"):
        codes, scale, group_scale = _quantize_smoothed(problem)
    per_channel = group_scale.double().repeat_interleave(_smoothing_group(problem), 1)
    return (codes.double() * scale.double()[:, None] * per_channel) @ _weight(problem).T


def _expected_floating(problem: Problem) -> Tensor:
    return problem.x.double() @ problem.weight.double().T


def _cublas(problem: Problem) -> Call:
    return lambda: torch.nn.functional.linear(problem.x, problem.weight)


def _int8_operands(problem: Problem) -> tuple[Tensor, Tensor]:
    x_scale = problem.x.float().abs().amax(1) / 127
    w_scale = problem.weight.float().abs().amax(1) / 127
    x = (problem.x.float() / x_scale[:, None]).round().to(torch.int8)
    return x, (problem.weight.float() / w_scale[:, None]).round().to(torch.int8)


def _int8(problem: Problem) -> Call:
    """Int8 by int8 to int32, quantized beforehand; its scales are left out, in its favour."""
    x, w = _int8_operands(problem)
    return lambda: int8_matmul(x, w)


def _expected_int8(problem: Problem) -> Tensor:
    x, w = _int8_operands(problem)
    return x.double() @ w.double().T


def _fp8(problem: Problem) -> Call:
    """Per-token and per-channel float8, quantized beforehand."""
    limit = 448.0
    x_scale = (problem.x.float().abs().amax(1, keepdim=True) / limit).contiguous()
    w_scale = (problem.weight.float().abs().amax(1, keepdim=True) / limit).contiguous()
    x = (problem.x.float() / x_scale).to(torch.float8_e4m3fn)
    w = (problem.weight.float() / w_scale).to(torch.float8_e4m3fn).t()
    return lambda: torch._scaled_mm(x, w, scale_a=x_scale, scale_b=w_scale.t(), out_dtype=torch.bfloat16)


def _fp8_unavailable(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA device"
    return None if torch.cuda.get_device_capability(device) >= (8, 9) else "needs compute capability 8.9"


def _humming(problem: Problem) -> Call:
    """humming-kernels' W4A8: 4-bit weights, 8-bit activations, its own quantization of both."""
    from humming.layer import HummingLayer  # type: ignore[import-not-found]

    layer = HummingLayer(
        shape_n=problem.shape.out_features,
        shape_k=problem.shape.in_features,
        weight_config={"dtype": "int4"},
        input_config={"dtype": "int8"},
        torch_dtype=torch.bfloat16,
    ).to(problem.x.device)
    layer.load_from_unquantized(problem.weight)
    layer.transform()
    return lambda: layer(problem.x)


def _humming_unavailable(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA device"
    return None if importlib.util.find_spec("humming") else "the package humming-kernels is not installed"


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("cublas", "bfloat16 by the library", _cublas, _expected_floating, 1e-2, weight_bits=16),
        Contender(
            "rrsq",
            "the product, of quantized activations and packed weights",
            _ours_product,
            _expected_product(smoothed=True),
            4e-3,
            turn="product",
        ),
        Contender(
            "rrsq-unsmoothed",
            "the same with one scale a token",
            _ours_unsmoothed,
            _expected_product(smoothed=False),
            4e-3,
            turn="product",
            only_grouped=True,
        ),
        Contender(
            "rrsq-linear",
            "quantization (and rotation) and product",
            _ours_linear,
            _expected_product(smoothed=True),
            4e-3,
        ),
        Contender(
            "quantize",
            "smoothing and quantization alone, with the rotation if it is in blocks",
            _ours_quantization,
            _expected_operand(False),
            0.0,
            stage=True,
        ),
        Contender(
            "rotate-quantize",
            "with the rotation of the whole input",
            _ours_rotated_quantization,
            _expected_operand(True),
            0.0,
            stage=True,
            only_rotated=True,
        ),
        Contender(
            "rrsq-float-scales",
            "real group scales in the product, sequence scope",
            _ours_group_scaled,
            _expected_group_scaled,
            1e-2,
        ),
        Contender("int8", "torch._int_mm to int32, no scales", _int8, _expected_int8, 1e-12, weight_bits=8),
        Contender(
            "fp8",
            "torch._scaled_mm, row-wise",
            _fp8,
            _expected_floating,
            6e-2,
            _fp8_unavailable,
            weight_bits=8,
        ),
        Contender("humming", "humming-kernels W4A8", _humming, _expected_floating, 0.3, _humming_unavailable),
    )
}


def contenders_for(against: list[str], shape: LinearShape, scheme: LinearScheme) -> list[Contender]:
    """Our rows and the baselines asked for, the library's bfloat16 first."""
    ours = ["cublas", *(name for name in CONTENDERS if name.startswith("rrsq") or CONTENDERS[name].stage)]
    names = [*ours, *(name for name in against if name not in ours)]
    chosen = [CONTENDERS[name] for name in names]
    return [
        contender
        for contender in chosen
        if ((shape.rotated and scheme.block is None) or not contender.only_rotated)
        and (scheme.group_size is not None or not contender.only_grouped)
    ]
