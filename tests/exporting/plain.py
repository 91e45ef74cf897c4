"""Reading an export by the documented layout of compressed-tensors, without its code or rrsq's.

``weight = scale * (code - zero)``; in int32 words the first code lies in the lowest bits, as ``code +
2**(bits - 1)``; weights are packed along the channels, zero points along the rows.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import nn

__all__ = ["decoded_weights", "plain_model", "scheme_of", "stored"]


def stored(folder: Path) -> dict[str, Any]:
    """All tensors, as numpy has them; bfloat16 is not among its dtypes."""
    return {name: array for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def scheme_of(folder: Path, path: str) -> dict[str, Any] | None:
    """The group of a linear: by its name, by a pattern, or as a linear."""
    quantization = config_of(folder)["quantization_config"]
    if path in quantization["ignore"]:
        return None
    groups = quantization["config_groups"].values()
    for fits in (
        lambda target: target == path,
        lambda target: target.startswith("re:") and re.match(target[3:], path),
        lambda target: target == "Linear",
    ):
        found = [group for group in groups if any(fits(target) for target in group["targets"])]
        if found:
            assert len(found) == 1
            return found[0]
    return None


def unpacked(words: Any, bits: int, columns: int) -> Any:
    """int64 ``[rows, columns]`` of int32 ``[rows, words]``."""
    place = np.arange(columns)
    taken = words.view(np.uint32).astype(np.int64)[:, place * bits // 32]
    return ((taken >> (place * bits % 32)) & (2**bits - 1)) - 2 ** (bits - 1)


def decoded_weights(folder: Path) -> dict[str, Any]:
    """The weights of the quantized linears, float64 ``[out, in]``, by module path."""
    tensors = stored(folder)
    weights = {}
    for name, scale in tensors.items():
        path, _, leaf = name.rpartition(".")
        if leaf != "weight_scale":
            continue
        scheme = scheme_of(folder, path)
        assert scheme is not None
        weight = scheme["weights"]
        if scheme["input_activations"] is not None:
            code = tensors[f"{path}.weight"].astype(np.int64)
        else:
            out, columns = tensors[f"{path}.weight_shape"]
            code = unpacked(tensors[f"{path}.weight_packed"], weight["num_bits"], columns)
            assert code.shape[0] == out
        groups = scale.shape[1]
        assert groups == (1 if weight["strategy"] == "channel" else code.shape[1] // weight["group_size"])
        zero = 0
        if not weight["symmetric"]:
            zero = unpacked(tensors[f"{path}.weight_zero_point"].T, weight["num_bits"], code.shape[0]).T
            zero = np.repeat(zero, code.shape[1] // groups, 1)
        steps = np.repeat(scale.astype(np.float64), code.shape[1] // groups, 1)
        weights[path] = steps * (code - zero)
    return weights


def plain_model(folder: Path, *, levels: float = 127.0) -> Any:
    """The architecture of transformers with the decoded weights, in float32.

    Args:
        folder: of an export.
        levels: what a token's largest magnitude is divided by to make the scale of an int8 input. vLLM (and
            rrsq) take 127; compressed-tensors in transformers takes 127.5.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    decoded = decoded_weights(folder)
    weights = {f"{path}.weight": torch.tensor(weight).float() for path, weight in decoded.items()}
    for name, array in stored(folder).items():
        if name.rpartition(".")[0] not in decoded or name.endswith(".bias"):
            weights[name] = torch.tensor(array)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert unexpected == []
    assert set(missing) <= set(model.all_tied_weights_keys or {})
    for path in decoded:
        scheme = scheme_of(folder, path)
        if scheme is not None and scheme["input_activations"] is not None:
            model.get_submodule(path).register_forward_pre_hook(_int8_input(levels))
    return model


def _int8_input(levels: float) -> Any:
    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> Any:
        (x,) = arguments
        scale = x.abs().amax(-1, keepdim=True) / levels
        return (x / scale).round().clamp(-128, 127) * scale

    return hook
