"""Telling whether two models are the same, by their configurations and their weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ModelFingerprint", "config_fingerprint", "model_fingerprint", "weights_fingerprint"]

# What differs between copies of one model: where it lies, who wrote the file, how it is loaded.
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")


@dataclass(frozen=True)
class ModelFingerprint:
    """SHA-256 (hex) of a model's configuration and of its weights."""

    config: str
    weights: str


def model_fingerprint(model: nn.Module) -> ModelFingerprint:
    """The fingerprint of a model as it was loaded: to be taken before anything changes its weights."""
    parameters = {name: partial(_itself, tensor) for name, tensor in model.named_parameters()}
    return ModelFingerprint(config_fingerprint(model.config), weights_fingerprint(parameters))


def config_fingerprint(config: Any) -> str:
    """SHA-256 (hex) of what a transformers configuration says beyond its class's defaults."""
    fields = {key: value for key, value in config.to_diff_dict().items() if key not in _VOLATILE}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()


def weights_fingerprint(parameters: Mapping[str, Callable[[], Tensor]], workers: int | None = None) -> str:
    """SHA-256 (hex) of all parameters: names, dtypes, shapes and bytes, in the order of their names.

    Args:
        parameters: by name, what gives the tensor; it is called once and the tensor not kept.
        workers: how many tensors are there at once; None leaves it to the machine.
    """
    names = sorted(parameters)
    with ThreadPoolExecutor(workers) as pool:  # hashlib lets go of the interpreter lock
        digests = pool.map(lambda name: _digest(parameters[name]()), names)
        whole = hashlib.sha256()
        for name, digest in zip(names, digests, strict=True):
            whole.update(f"{name} ".encode() + digest)
    return whole.hexdigest()


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _digest(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().flatten()
    digest = hashlib.sha256(flat.view(torch.uint8).numpy().data).digest()
    return f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + digest
