"""What a quantization run did, for the summary, the model card and ``rrsq inspect``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["LayerReport", "QuantizationReport"]


@dataclass
class LayerReport:
    """One decoder layer.

    Attributes:
        index: position in the model.
        output_snr_db: signal over error of the layer's output on calibration text, in dB, quantized against
            full precision on the same inputs; None when no text was run through the layer.
        weight_snr_db: the same of each input's linears, by its path, with weights quantized and activations
            left as they are, from the input's Hessian. Inputs without a Hessian, and experts, are left out.
        cache_error: relative error of the attention output that the quantized KV cache alone causes; None
            without a quantized cache or without text.
        fallbacks: inputs whose weights were rounded to nearest because GPTQ could not be used.
        undersampled_experts: experts that were quantized with the tokens of others as well, because the
            router sent them too few.
        seconds: time spent.
    """

    index: int
    output_snr_db: float | None = None
    weight_snr_db: dict[str, float] = field(default_factory=dict)
    cache_error: float | None = None
    fallbacks: list[str] = field(default_factory=list)
    undersampled_experts: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, path: str, snr_db: float | None, *, fell_back: bool) -> None:
        """What became of the linears of the input at ``path``."""
        if snr_db is not None:
            self.weight_snr_db[path] = snr_db
        if fell_back:
            self.fallbacks.append(path)


@dataclass
class QuantizationReport:
    """A whole run.

    Attributes:
        layers: one entry a decoder layer.
        sensitive_layers: layers whose keys were given 8 bits.
        head_fell_back: the output head was rounded to nearest because GPTQ could not be used.
        seconds: time of the whole run.
        bytes_before, bytes_after: size of all weights.
        peak_memory: bytes of resident memory at its highest (process), and of the GPU where one was used.
    """

    layers: list[LayerReport] = field(default_factory=list)
    sensitive_layers: list[int] = field(default_factory=list)
    head_fell_back: bool = False
    seconds: float = 0.0
    bytes_before: int = 0
    bytes_after: int = 0
    peak_memory: int = 0
    peak_gpu_memory: int | None = None

    @property
    def fallbacks(self) -> list[str]:
        """Every input that fell back to round-to-nearest, as ``layer N input``; the head as ``head``."""
        found = [f"layer {layer.index} {name}" for layer in self.layers for name in layer.fallbacks]
        return [*found, "head"] if self.head_fell_back else found

    @property
    def undersampled_experts(self) -> list[str]:
        """The experts that the router sent too few tokens, as ``layer N: i, j``."""
        return [
            f"layer {layer.index}: {', '.join(map(str, layer.undersampled_experts))}"
            for layer in self.layers
            if layer.undersampled_experts
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> QuantizationReport:
        """What :meth:`to_dict` gave."""
        layers = [LayerReport(**layer) for layer in data["layers"]]
        return cls(**{**data, "layers": layers})
