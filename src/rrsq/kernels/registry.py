"""The table of implementations: one entry a kernel. Importing it imports no kernel."""

from __future__ import annotations

import functools

import torch

from .dispatch import Constraints, Kernel, register

__all__ = ["OPERATIONS", "register_all"]

OPERATIONS = (
    "hadamard_transform",
    "quantize_folded",
    "quantize_smoothed",
    "linear_folded",
    "linear_group_scaled",
    "linear_weight_only",
    "grouped_linear",
)

_FLOATING = frozenset({torch.float16, torch.bfloat16, torch.float32})
_TRITON = "rrsq.kernels.triton"
_on_gpu = functools.partial(
    Constraints, device_types=frozenset({"cuda"}), minimum_capability=(8, 0), modules=("triton",)
)
_activation = functools.partial(
    _on_gpu,
    dtypes={"x": _FLOATING},
    at_least={"hadamard_columns": 16, "channels": 32},
    at_most={"hadamard_rows": 256, "channels": 32768, "group_size": 2048},
    power_of_two=frozenset({"group_size", "hadamard_columns"}),
)

_GPTQ = _on_gpu(
    dtypes={"block": frozenset({torch.float32})}, at_most={"channels": 128}
)  # A block's weights stay in registers.

_TRITON_KERNELS = (
    ("gptq_block", "gptq", _GPTQ),
    ("hadamard_transform", "activation", _activation()),
    ("quantize_folded", "activation", _activation()),
    ("quantize_smoothed", "activation", _activation()),
    ("linear_folded", "linear", _on_gpu(dtypes={"out_dtype": _FLOATING})),
    (
        "linear_group_scaled",
        "linear",
        _on_gpu(
            dtypes={"out_dtype": _FLOATING},
            at_least={"group_size": 32},
            at_most={"group_size": 256},
            power_of_two=frozenset({"group_size"}),
        ),
    ),
    ("linear_weight_only", "linear", _on_gpu(dtypes={"x": _FLOATING})),
    (
        "grouped_linear",
        "grouped",
        _on_gpu(
            dtypes={
                "operand": frozenset({torch.int8, torch.float16, torch.bfloat16}),
                "out_dtype": _FLOATING,
            },
            divisible={"in_features": 64},
            at_least={"weight_group_size": 16, "group_size": 128},  # A whole packing block.
            at_most={"group_size": 256},
            power_of_two=frozenset({"weight_group_size", "group_size"}),
        ),
    ),
)


def register_all() -> None:
    """Register every implementation that ships with rrsq."""
    for operation in OPERATIONS:
        target = f"rrsq.kernels.reference:{operation}"
        register(Kernel(operation, f"eager.{operation}", "eager", target, Constraints(), 0))
    target = "rrsq.kernels.eager.gptq:gptq_block"
    register(Kernel("gptq_block", "eager.gptq_block", "eager", target, Constraints(), 0))
    for operation, module, constraints in _TRITON_KERNELS:
        target = f"{_TRITON}.{module}:{operation}"
        register(Kernel(operation, f"triton.{operation}", "triton", target, constraints, 10))


register_all()
