"""Tiny mixtures whose router is steered by the tokens, quantized by several processes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from forked import exit_codes, forked, torchrun_environments
from tiny_quantized import VOCABULARY_SIZE, recipe_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NOBODYS", "UPPER_HALFS", "quantized_by", "steered_mixture", "steering_windows"]

NOBODYS, UPPER_HALFS = 2, 1  # Experts that no token goes to, and that those of the upper half go to.
STRENGTH = 5.0


def steered_mixture(name: str) -> Any:
    """A mixture of :data:`tiny_families.TINY` with two channels of the stream that the router goes by."""
    import torch

    from rrsq.runtime.modules.experts import Experts
    from tiny_families import tiny_model

    model = tiny_model(name)
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding[:, 0] = STRENGTH
        embedding[:, 1] = STRENGTH
        embedding[: VOCABULARY_SIZE // 2, 1] = -STRENGTH
        for layer in model.model.layers:
            gate = getattr(layer.mlp, "gate", None)
            if gate is not None:
                gate.weight[NOBODYS] = 0
                gate.weight[NOBODYS, 0] = -100
                gate.weight[UPPER_HALFS] = 0
                gate.weight[UPPER_HALFS, 1] = 100
    assert not any(isinstance(module, Experts) for module in model.modules())
    return model


def steering_windows(samples: int, tokens: int) -> Tensor:
    """Windows ``[samples, tokens]``, those behind the first half of tokens of the upper half."""
    import torch

    half = VOCABULARY_SIZE // 2
    windows = torch.randint(2, half, (samples, tokens), generator=torch.Generator().manual_seed(1))
    windows[-(samples // 2) :] += half - 2
    return windows


def quantized_by(
    processes: int, name: str, recipe: str, windows: Tensor, folder: Path, *, failing: int | None = None
) -> list[dict[str, Any]]:
    """What each of some processes has in the end: its tensors (``model``) and its reports (``layers``).

    ``failing`` has the Hessian of this number, from 0, that the last process factors fail.
    """
    import torch

    arguments = name, recipe, windows.tolist(), folder, failing
    running = [forked(_quantize, *arguments, environment=each) for each in torchrun_environments(processes)]
    assert exit_codes(running, seconds=120) == [0] * processes
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]


def _quantize(name: str, recipe: str, windows: list[list[int]], folder: Path, failing: int | None) -> None:
    import torch

    from rrsq.quantizer import weights
    from rrsq.quantizer.calibration.workers import joined_workers
    from rrsq.quantizer.options import QuantizationOptions
    from rrsq.quantizer.pipeline import quantize_model

    torch.set_num_threads(1)
    original, seen = weights.factor_hessian, []

    def factor_hessian(hessian: Tensor, **options: Any) -> Any:
        seen.append(hessian.shape[0])
        return original(hessian * torch.nan if len(seen) - 1 == failing else hessian, **options)

    with joined_workers(torch.device("cpu")) as workers:
        if workers.rank == workers.count - 1:
            weights.factor_hessian = factor_hessian
        quantized = quantize_model(
            steered_mixture(name),
            recipe_of(recipe),
            torch.tensor(windows),
            QuantizationOptions(
                hessian_bytes=3 * 4 * (60**2 + 44**2),  # The experts in more batches than one.
                stream_dtype=torch.float32,
                workers=workers,
            ),
        )
        layers = [vars(layer) for layer in quantized.report.layers]
        torch.save({"model": quantized.model.state_dict(), "layers": layers}, folder / f"{workers.rank}.pt")
