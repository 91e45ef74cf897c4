"""A contender in its engine, ready to be timed."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .random_weights import count_bytes, fill

__all__ = ["RunningModel", "open_model"]


class RunningModel(ABC):
    """A model that continues prompts."""

    vocabulary: int
    device: str
    weight_bytes: int
    """Of one process."""
    cache_tokens: int | None = None
    """Room in the KV cache of an engine that sets it aside."""

    @abstractmethod
    def generate(self, prompts: list[list[int]], new_tokens: int) -> object:
        """Continue the prompts, all of the same length, by exactly so many tokens; back when all are made."""

    def peak_bytes(self) -> int | None:
        """The most memory of the device that was taken so far; None where that says nothing."""
        return None


def open_model(
    engine: str, path: Path, *, has_files: bool, options: Mapping[str, Any], longest: int, most: int
) -> RunningModel:
    """Load a contender.

    Args:
        engine: ``vllm`` or ``transformers``.
        path: a folder with a ``config.json``.
        has_files: whether the weights are there; else they are random.
        options: of vLLM's ``LLM``, or of ``generate()``; ``device`` is where transformers computes.
        longest: tokens of a request, new ones included.
        most: requests at once.
    """
    if engine == "vllm":
        return _InVLLM(path, has_files, options, longest, most)
    return _InTransformers(path, has_files, options)


class _InVLLM(RunningModel):
    def __init__(
        self, path: Path, has_files: bool, options: Mapping[str, Any], longest: int, most: int
    ) -> None:
        from rrsq.vllm.engine import Engine, device_name

        os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # fill is handed to the workers.
        given = {
            "load_format": "auto" if has_files else "dummy",
            "skip_tokenizer_init": True,
            "enable_prefix_caching": False,
            "max_model_len": longest,
            "max_num_seqs": max(128, most),
            **options,
        }
        self._engine = Engine(str(path), given)
        self.weight_bytes = self._engine.apply(count_bytes if has_files else fill)
        self.vocabulary = self._engine.vocabulary
        self.cache_tokens = self._engine.cache_tokens
        self.device = device_name()

    def generate(self, prompts: list[list[int]], new_tokens: int) -> object:
        return self._engine.complete(prompts, new_tokens, to_the_end=True)


class _InTransformers(RunningModel):
    def __init__(self, path: Path, has_files: bool, options: Mapping[str, Any]) -> None:
        import torch

        self._options = dict(options)
        self._place = torch.device(self._options.pop("device"))
        torch.manual_seed(0)
        self._model: Any = _load(path, self._place) if has_files else _make_up(path, self._place)
        # No end of text, and no sampling, whatever the checkpoint's own generation_config says.
        from transformers import GenerationConfig

        self._model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
        self.vocabulary = int(self._model.config.get_text_config().vocab_size)
        self.weight_bytes = count_bytes(self._model)
        on_gpu = self._place.type == "cuda"
        self.device = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def generate(self, prompts: list[list[int]], new_tokens: int) -> object:
        import torch

        tokens = torch.tensor(prompts, device=self._place)
        made = self._model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new_tokens, **self._options
        )
        made = made.cpu()  # Waits for the device.
        if made.shape[1] != tokens.shape[1] + new_tokens:
            raise RuntimeError(
                f"{made.shape[1] - tokens.shape[1]} tokens came where {new_tokens} were asked for"
            )
        return made

    def peak_bytes(self) -> int | None:
        import torch

        return torch.cuda.max_memory_allocated() if self._place.type == "cuda" else None


def _load(path: Path, device: Any) -> Any:
    from rrsq.runtime.format.loading import load_model

    return load_model(str(path), device=str(device))


def _make_up(path: Path, device: Any) -> Any:
    """A model of random weights, made on the device; with a section of rrsq's, of random codes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from rrsq.runtime.format.format import parse_info
    from rrsq.runtime.format.integration import assemble_model
    from rrsq.runtime.format.json_files import read_config
    from rrsq.runtime.ready import make_ready

    config = AutoConfig.from_pretrained(path)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    section = read_config(path).get("quantization_config")
    with torch.device(device), torch.no_grad():
        model: Any = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.bfloat16)
        if section is not None:
            assemble_model(model, parse_info(section))
        model.to(device)
        fill(model)
    # What it compares formulas with is made on the CPU, whatever the device of the model.
    with torch.no_grad():
        make_ready(model)
    return model.eval()
