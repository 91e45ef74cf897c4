"""The last step of loading a model: what makes it run as fast as it can where it is."""

from __future__ import annotations

from typing import Any

from .assemble import settle
from .decoding import attach_decoder
from .fusion import fuse
from .norms import use_norm_kernels

__all__ = ["make_ready"]


def make_ready(model: Any) -> None:
    """To be called once, when a model of quantized modules has its tensors where they stay.

    What a first forward pass would do is done, norms get their kernel, layers few of them, and decoding its
    graphs. All of it finds out at each call whether it is for the device and the cache at hand.
    """
    settle(model)
    use_norm_kernels(model)
    fuse(model)
    attach_decoder(model)
