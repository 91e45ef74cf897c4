"""The operations of a quantized linear and the dispatch between their implementations.

Activations are ``[tokens, channels]``; weights are packed INT4 (:mod:`.eager.packing`). :mod:`.eager` is the
reference that every kernel is compared with. Importing this package neither queries CUDA nor imports triton.
"""

from .eager.activation import tokens_per_set
from .operation import use_kernels
from .ops import (
    grouped_linear,
    hadamard_transform,
    linear_folded,
    linear_group_scaled,
    linear_weight_only,
    quantize_folded,
    quantize_smoothed,
)
from .packing import pack_int4, unpack_int4, weight_operand
from .report import KernelReport, kernel_report
from .routing import Routing, route_rows

__all__ = [
    "KernelReport",
    "Routing",
    "grouped_linear",
    "hadamard_transform",
    "kernel_report",
    "linear_folded",
    "linear_group_scaled",
    "linear_weight_only",
    "pack_int4",
    "quantize_folded",
    "quantize_smoothed",
    "route_rows",
    "tokens_per_set",
    "unpack_int4",
    "use_kernels",
    "weight_operand",
]
