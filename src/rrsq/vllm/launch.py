"""How vLLM is started for a checkpoint. Does not import vLLM."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

from ..errors import ModelLoadError, UsageError
from ..runtime.format.format import parse_info
from ..runtime.format.json_files import read_config
from ..runtime.format.loading import is_checkpoint, load_config, locate_model
from ..runtime.format.validate import check_description, check_layers
from .limits import check_servable

__all__ = [
    "TESTED_VERSION",
    "Launch",
    "check_checkpoint",
    "check_installation",
    "engine_environment",
    "plan_launch",
]

TESTED_VERSION = "0.26"
"""The releases of vLLM that the plugin is tested with; ``pyproject.toml`` asks for the same."""


@dataclass(frozen=True)
class Launch:
    """A command that serves a checkpoint.

    Attributes:
        command: program and arguments.
        environment: variables that are set for it.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str]

    def __str__(self) -> str:
        """As a shell takes it, with ``vllm`` for the program that is run."""
        words = ("vllm", *self.command[3:])
        settings = (f"{name}={value}" for name, value in self.environment.items())
        return " ".join((*settings, shlex.join(words)))


def check_checkpoint(path: str, tensor_parallel_size: int) -> None:
    """Refuse a folder that cannot be served; only headers are read.

    Raises:
        ModelLoadError: it is none of a checkpoint.
        CheckpointError: it is damaged, incomplete, or of another format version.
        UsageError: it cannot be served, or not by so many processes.
    """
    locate_model(path)  # Says what is wrong with a path.
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ModelLoadError(f"'{path}' is no checkpoint: there is no config.json in it.")
    description = read_config(folder)
    if not is_checkpoint(path):
        raise UsageError(
            f"'{path}' is a model, but none that rrsq quantized: 'vllm serve {path}' serves it as it is, and"
            f" 'rrsq quantize {path} -o out/' makes a checkpoint of it."
        )
    info = parse_info(description["quantization_config"])
    config = load_config(path)
    check_description(config, info)
    check_layers(folder, config.get_text_config().num_hidden_layers)
    check_servable(config, info, tensor_parallel_size)


def check_installation() -> str | None:
    """Whether vLLM is there and will find the plugin.

    Returns:
        A warning, or None.

    Raises:
        UsageError: it is not there, or will not find it.
    """
    try:
        found = version("vllm")
    except PackageNotFoundError:
        raise UsageError(
            "vLLM is not installed in this environment. Install it with: pip install 'rrsq[vllm]' (on Linux,"
            " with an NVIDIA GPU of compute capability 8.0 or newer)."
        ) from None
    if not any(point.name == "rrsq" for point in entry_points(group="vllm.general_plugins")):
        raise UsageError(
            "vLLM would not find rrsq, which is imported from a folder and not installed. Install it with:"
            " pip install 'rrsq[vllm]' (or pip install -e . in its folder)."
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "rrsq" not in allowed.split(","):
        raise UsageError(f"VLLM_PLUGINS={allowed} keeps vLLM from loading rrsq. Add rrsq to it, or unset it.")
    if not f"{found}.".startswith(f"{TESTED_VERSION}."):
        return f"vLLM {found} is installed; rrsq is tested with {TESTED_VERSION}."
    return None


def plan_launch(
    path: str, tensor_parallel_size: int = 1, options: Sequence[str] = (), kv_cache_dtype: str = "auto"
) -> Launch:
    """The command that serves a checkpoint.

    Args:
        path: of the checkpoint.
        tensor_parallel_size: processes, one a GPU.
        options: further options of ``vllm serve``; they win over what is chosen here.
        kv_cache_dtype: ``auto`` is the recipe's.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", path]
    if tensor_parallel_size > 1:
        command += ["--tensor-parallel-size", str(tensor_parallel_size)]
    if kv_cache_dtype != "auto":
        command += ["--kv-cache-dtype", kv_cache_dtype]
    kept = {name: value for name, value in engine_environment().items() if name not in os.environ}
    return Launch((*command, *options), kept)


def engine_environment() -> dict[str, str]:
    """Variables that vLLM needs for a checkpoint, however it is started; those of the user's own win."""
    if importlib.util.find_spec("flashinfer") is None:
        # vLLM takes it to be there, as its own requirements say, and would fail to import it.
        return {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
    return {}
