"""What a calibration run found, as plain data: read from its layer files, for the table, page and JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..quantizer.calibration.manifest import CalibrationManifest
from ..quantizer.calibration.stored import StoredCalibration
from .observe import sample_shape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["InputRow", "OutlierReport", "Spike", "read_report", "write_report_json"]

# Rows of the tables of the worst and the spikiest, and how many of each are drawn in detail.
LISTED = 10
WORST_DRAWN, SPIKY_DRAWN = 10, 2
_TEXT_LENGTH = 24


@dataclass(frozen=True)
class Spike:
    """One of an input's tokens of the largest magnitude.

    Attributes:
        window, position: of the token in the calibration windows, from 0.
        text: of the token, shortened.
        magnitude: its largest ``|x|``.
    """

    window: int
    position: int
    text: str
    magnitude: float


@dataclass(frozen=True)
class InputRow:
    """One linear input of one layer; the numbers are :class:`rrsq.diagnostics.analysis.InputAnalysis`'s."""

    layer: int
    input: str
    ratio: dict[str, float]
    output_error: float
    activation_error: float
    weight_error: float
    token_error: float
    median_magnitude: float
    spikes: tuple[Spike, ...]

    @property
    def spike_strength(self) -> float:
        """The largest token's magnitude over the median token's."""
        return self.spikes[0].magnitude / max(self.median_magnitude, 1e-30)


@dataclass(frozen=True)
class OutlierReport:
    """All inputs of all layers, and where their profiles are."""

    manifest: CalibrationManifest
    rows: tuple[InputRow, ...]
    stored: StoredCalibration

    @cached_property
    def worst(self) -> tuple[InputRow, ...]:
        """The ten inputs of the largest output error, the largest first."""
        return tuple(sorted(self.rows, key=lambda row: -row.output_error)[:LISTED])

    @cached_property
    def spiky(self) -> tuple[InputRow, ...]:
        """The ten inputs whose largest token stands out most, that first."""
        return tuple(sorted(self.rows, key=lambda row: -row.spike_strength)[:LISTED])

    @cached_property
    def detailed(self) -> tuple[tuple[InputRow, int | None], ...]:
        """The inputs to draw in detail: the worst with their rank from 1, and the spikiest of the others."""
        worst = self.worst[:WORST_DRAWN]
        spiky = [row for row in self.spiky if row not in worst]
        ranked: list[tuple[InputRow, int | None]] = [(row, rank) for rank, row in enumerate(worst, 1)]
        return (*ranked, *((row, None) for row in spiky[:SPIKY_DRAWN]))

    @property
    def sample_tokens(self) -> int:
        """Tokens that errors and ratios were measured on."""
        windows, tokens = sample_shape(self.manifest.num_samples, self.manifest.sequence_length)
        return windows * tokens

    def of_input(self, name: str) -> list[InputRow]:
        """The rows of one input, by layer."""
        return [row for row in self.rows if row.input == name]

    def profile(self, row: InputRow, what: str) -> Tensor:
        """``channel_absmax``, ``token_absmax`` or ``magnitudes`` of an input, float32, stages first."""
        return self.stored.tensor(row.layer, f"{row.input}.report.{what}")


def read_report(
    stored: StoredCalibration, windows: Tensor, tokenizer: PreTrainedTokenizerBase
) -> OutlierReport:
    """Read the numbers of all layers.

    Args:
        stored: a calibration folder.
        windows: int64 ``[samples, tokens]`` that it was made from.
        tokenizer: names the spike tokens.

    Raises:
        CalibrationError: a layer's file is damaged.
    """
    rows = []
    for layer in range(stored.manifest.layers):
        for name, numbers in stored.numbers(layer).items():
            spikes = tuple(
                Spike(window, position, _token_text(tokenizer, int(windows[window, position])), magnitude)
                for window, position, magnitude in numbers.pop("spikes")
            )
            rows.append(InputRow(layer=layer, input=name, spikes=spikes, **numbers))
    return OutlierReport(stored.manifest, tuple(rows), stored)


def write_report_json(report: OutlierReport, path: Path) -> None:
    """Write the numbers of all inputs as JSON."""
    data = {"inputs": [{**asdict(row), "spike_strength": row.spike_strength} for row in report.rows]}
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """The token in quotes, with control characters escaped."""
    text = tokenizer.decode(torch.tensor([token]))
    assert isinstance(text, str)
    return repr(text if len(text) <= _TEXT_LENGTH else text[:_TEXT_LENGTH] + "…")
