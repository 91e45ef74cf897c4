"""What a calibration run will take, said before it starts."""

from __future__ import annotations

from dataclasses import dataclass

from ..quantizer.calibration.triangle import packed_size
from .analysis import MAP_CHANNELS, MAP_TOKENS, STAGES
from .observe import sample_shape

__all__ = ["ExpectedSizes", "expected_sizes"]

_FLOAT = 4
# Pictures and tables: some 14 PNG files of 0.2 MB, twice (as files and in the page), with room to spare.
_REPORT = 10_000_000
# Python with its libraries and a calibration text.
_PROCESS = 1_000_000_000
# Copies of a sample that the analysis of one input holds at a time: three stages, thrice, and the outputs.
_ANALYSIS_COPIES = 12
_BATCH_TOKENS = 4096
# What one batch needs inside a layer, in copies of its widest tensor.
_LAYER_COPIES = 6


@dataclass(frozen=True)
class ExpectedSizes:
    """Bytes that a run will take.

    Attributes:
        hessians: on the disk, of all Hessians.
        report: on the disk, of everything else.
        memory: in RAM and, with a GPU, on both together; an estimate.
    """

    hessians: int
    report: int
    memory: int

    @property
    def disk(self) -> int:
        """Bytes of the whole folder."""
        return self.hessians + self.report


def expected_sizes(
    inputs: dict[str, int],
    *,
    layers: int,
    hidden: int,
    model_bytes: int,
    num_samples: int,
    sequence_length: int,
    hessians: bool,
) -> ExpectedSizes:
    """Estimate what a run will take.

    Args:
        inputs: channels of each linear input of a layer.
        layers: of the model.
        hidden: size of the residual stream.
        model_bytes: of all weights.
        num_samples, sequence_length: windows, and tokens in each.
        hessians: whether they are stored.
    """
    channels, widest = sum(inputs.values()), max(inputs.values())
    windows, tokens = sample_shape(num_samples, sequence_length)
    cells = sum(min(tokens, MAP_TOKENS) * min(size, MAP_CHANNELS) for size in inputs.values())
    profiles = len(STAGES) * (channels + len(inputs) * tokens + cells)
    report = _REPORT + layers * _FLOAT * (3 * channels + profiles)
    triangles = layers * sum(packed_size(size) for size in inputs.values()) + packed_size(hidden)
    packed = _FLOAT * triangles if hessians else 0
    stream = num_samples * sequence_length * hidden
    # A layer's linears in float32 are some three times its inputs' channels by the hidden size, held twice.
    weights = 6 * channels * hidden
    square = sum(size**2 for size in inputs.values()) + 2 * widest**2 if hessians else 0
    batch = max(_BATCH_TOKENS, sequence_length) * widest * _LAYER_COPIES
    sample = windows * tokens * (channels + _ANALYSIS_COPIES * widest)
    memory = _PROCESS + model_bytes + _FLOAT * (stream + weights + square + max(batch, sample))
    return ExpectedSizes(packed, report, memory)
