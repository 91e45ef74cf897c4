"""Telling whether two models are the same, by their configurations and their weights."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ModelFingerprint", "config_fingerprint", "model_fingerprint"]

# What differs between copies of one model: where it lies, who wrote the file, how it is loaded.
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")


@dataclass(frozen=True)
class ModelFingerprint:
    """SHA-256 (hex) of a model's configuration and of its weights."""

    config: str
    weights: str


def model_fingerprint(model: nn.Module) -> ModelFingerprint:
    """The fingerprint of a model as it was loaded: to be taken before anything changes its weights."""
    return ModelFingerprint(config_fingerprint(model.config), _weights_fingerprint(model))


def config_fingerprint(config: Any) -> str:
    """SHA-256 (hex) of what a transformers configuration says beyond its class's defaults."""
    fields = {key: value for key, value in config.to_diff_dict().items() if key not in _VOLATILE}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()


def _weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 (hex) of all parameters: names, dtypes, shapes and bytes, in the order of their names."""
    parameters = sorted(model.named_parameters())
    with ThreadPoolExecutor() as pool:  # hashlib lets go of the interpreter lock
        digests = list(pool.map(_digest, (tensor for _, tensor in parameters)))
    whole = hashlib.sha256()
    for (name, tensor), digest in zip(parameters, digests, strict=True):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode() + digest)
    return whole.hexdigest()


def _digest(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().flatten()
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).digest()
