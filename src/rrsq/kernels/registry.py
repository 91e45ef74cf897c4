"""The table of implementations: one entry a kernel. Importing it imports no kernel."""

from __future__ import annotations

import torch

from .dispatch import Constraints, Kernel, register

__all__ = ["OPERATIONS", "register_all"]

OPERATIONS = (
    "hadamard_transform",
    "quantize_folded",
    "quantize_smoothed",
    "weight_operand",
    "linear_folded",
    "linear_group_scaled",
    "linear_weight_only",
)

_FLOATING = frozenset({torch.float16, torch.bfloat16, torch.float32})


def register_all() -> None:
    """Register every implementation that ships with rrsq."""
    for operation in OPERATIONS:
        register(
            Kernel(
                operation,
                f"eager.{operation}",
                "eager",
                f"rrsq.kernels.reference:{operation}",
                Constraints(),
                0,
            )
        )


register_all()
