"""The operations of a quantized linear, each with its reference and its kernels in one file.

Activations are ``[tokens, channels]``; weights are packed INT4 (:mod:`.packing`). :mod:`.operation` says how
an operation is defined and how its kernel is chosen. Importing this package does not query CUDA.
"""

from .cache import CachePages, decode_cache, encode_cache
from .cache_append import cache_append
from .cache_attend import cache_attend
from .cache_read import cache_gather, cache_read
from .gated_quantize import gated_quantize
from .gptq_block import gptq_block
from .grouped_linear import Routing, grouped_linear, route_rows
from .linear_group_scaled import linear_group_scaled
from .linear_int8 import linear_int8
from .linear_w4a16 import linear_w4a16
from .linear_w8a16 import linear_w8a16
from .operation import forced_backend, use_kernels
from .packing import pack_int4, unpack_int4, weight_operand
from .quantize_signed import quantize_signed
from .quantize_smoothed import quantize_smoothed, tokens_per_set
from .quantize_tokens import quantize_tokens
from .rms_norm import rms_norm
from .rms_norm_quantize import add_rms_norm_quantize, rms_norm_quantize
from .rotary import rotary
from .rotation import hadamard_transform

__all__ = [
    "CachePages",
    "Routing",
    "add_rms_norm_quantize",
    "cache_append",
    "cache_attend",
    "cache_gather",
    "cache_read",
    "decode_cache",
    "encode_cache",
    "forced_backend",
    "gated_quantize",
    "gptq_block",
    "grouped_linear",
    "hadamard_transform",
    "linear_group_scaled",
    "linear_int8",
    "linear_w4a16",
    "linear_w8a16",
    "pack_int4",
    "quantize_signed",
    "quantize_smoothed",
    "quantize_tokens",
    "rms_norm",
    "rms_norm_quantize",
    "rotary",
    "route_rows",
    "tokens_per_set",
    "unpack_int4",
    "use_kernels",
    "weight_operand",
]
