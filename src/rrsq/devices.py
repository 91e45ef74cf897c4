"""Where to compute."""

from __future__ import annotations

from .errors import UsageError

__all__ = ["find_device"]


def find_device(device: str) -> str:
    """Return the name of the device to compute on.

    Args:
        device: ``auto`` (CUDA if there is one), ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        UsageError: CUDA is asked for and missing, or the name is none of these.
    """
    import torch

    if not isinstance(device, str):
        raise UsageError(f"device is {device!r:.100}, and must be auto, cpu, cuda or cuda:N.")
    available = torch.cuda.is_available()
    kind, _, number = device.partition(":")
    if device not in ("auto", "cpu", "cuda") and not (kind == "cuda" and number.isdecimal()):
        raise UsageError(f"There is no device '{device}'. Use auto, cpu, cuda or cuda:N.")
    if kind == "cuda" and not available:
        raise UsageError(f"--device {device}: torch sees no CUDA device. Use --device cpu or auto.")
    if number and int(number) >= torch.cuda.device_count():
        raise UsageError(f"There is no device '{device}': torch sees {torch.cuda.device_count()}.")
    if device == "auto":
        return "cuda" if available else "cpu"
    return device
